"""Laws of featx fit without further options: it tries recipes, says what and why, and can be ended."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from commands import run, run_json
from pictures import encode

from featx import FeatureStore, FineTuneRegressor, TransferClassifier
from featx.cli.fit import _LATE

MICRO = ["--backbone", "featx_micro"]
BOARD = ["probe", "layers", "lda", "last-stage", "last-two", "last-two-flip", "mean"]


pytestmark = pytest.mark.usefixtures("cache")


def write_photos(folder: Path, n: int, seed: int = 0) -> Path:
    """Noisy photos of two classes, some of which are mistaken."""
    rng = np.random.default_rng(seed)
    for name, red in (("red", True), ("blue", False)):
        (folder / name).mkdir(parents=True)
        for i in range(n // 2):
            pixels = rng.integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
            pixels[..., 0 if red else 2] //= 2
            pixels[:, : rng.integers(8, 33)] = rng.integers(0, 256, size=3)
            (folder / name / f"{i:03}.png").write_bytes(encode(pixels, "PNG"))
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", 32)


def test_every_recipe_is_told_and_the_model_is_what_the_library_would_choose(
    photos: Path, tmp_path: Path, cache: FeatureStore
) -> None:
    result = run("fit", photos, "-o", "m.joblib", *MICRO, "--time-budget", 3, "--report", "r.html", "--json")
    found = json.loads(result.stdout)
    board = found["leaderboard"]
    assert [row["recipe"] for row in board] == BOARD
    assert sorted(re.findall(r"^([a-z-]+)(?: .*)?: ", result.stderr, flags=re.MULTILINE)) == sorted(BOARD)
    for row in board:
        assert (row["mean"] is None) == (row["n_folds"] == 0)
        assert row["n_folds"] or row["not_tried"]
        assert row["not_tried"] in result.stderr
    assert cache.info()["computed"] >= 32
    model = joblib.load("m.joblib")
    assert isinstance(model, TransferClassifier)
    assert model.best_recipe_ == found["recipe"]
    assert model.best_score_ == found["accuracy"]
    assert {model.cache, model.device, model.n_jobs, model.verbose} == {None, 0}
    assert Path("m.joblib").stat().st_size < 1e6
    paths = [str(path) for path in sorted(photos.glob("*/*.png"))]
    (photos / "red" / "broken.png").touch()
    told = run_json("predict", "m.joblib", photos)["predictions"]
    labels = {row["path"]: (row["label"], row["confidence"]) for row in told}
    assert labels.pop(str(photos / "red" / "broken.png")) == (None, None)
    assert [labels[path][0] for path in paths] == model.predict(paths).tolist()
    np.testing.assert_allclose([labels[path][1] for path in paths], model.predict_proba(paths).max(axis=1), rtol=1e-5)
    assert len(run_json("similar", "m.joblib", photos, paths[0], "-n", 3)["results"]) == 3


def test_the_search_without_a_budget_in_the_way_is_that_of_the_library(photos: Path, cache: FeatureStore) -> None:
    found = run_json("fit", photos, "-o", "m.joblib", *MICRO, "--time-budget", 0, "--scoring", "neg_log_loss")
    assert (found["n_computed"], cache.info()["computed"]) == (32, 32)
    assert (found["scoring"], found["recipe"]) == ("neg_log_loss", "probe")
    paths = np.array([str(path) for label in ("blue", "red") for path in sorted((photos / label).glob("*"))])
    y = np.repeat(["blue", "red"], 16)
    own = TransferClassifier("featx_micro", scoring="neg_log_loss", time_budget=0, random_state=0).fit(paths, y)
    assert found["neg_log_loss"] == pytest.approx(own.best_score_, rel=1e-6)


def test_a_mean_of_two_is_asked_as_one(photos: Path, tmp_path: Path) -> None:
    paths = np.array([str(path) for path in sorted(photos.glob("*/*"))], dtype=object)
    y = np.array([Path(path).parent.name for path in paths])
    model = TransferClassifier("featx_micro", recipes=["probe", "layers", "mean"], random_state=0).fit(paths, y)
    from featx.choosing.search import Search
    from featx.estimators.recipes import Mean

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Search, "winner", lambda self: self.entries[-1])
        model = model.fit(paths, y)
    assert isinstance(model.estimator_, Mean)
    joblib.dump(model, "mean.joblib")
    (photos / "red" / "broken.png").touch()
    told = [row for row in run_json("predict", "mean.joblib", photos)["predictions"] if row["label"]]
    np.testing.assert_allclose(
        [row["confidence"] for row in told], model.predict_proba([row["path"] for row in told]).max(axis=1), rtol=1e-5
    )
    assert run("predict", "mean.joblib", photos).stderr.count("broken.png") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-o", "m.safetensors"], "Type --fine-tune (without --quick), or name the model .joblib"),
        (["-o", "m.safetensors", "--quick"], "Type --fine-tune (without --quick)"),
        (["-o", "m.joblib", "--scoring", "acuracy"], "Did you mean accuracy?"),
        (["-o", "m.joblib", "--quick", "--time-budget", "9"], "--time-budget goes with the search"),
        (["-o", "m.joblib", "--layers", "-1", "--scoring", "accuracy"], "--scoring goes with the search"),
        (["-o", "m.joblib", "--fine-tune", "--quick"], "got both"),
    ],
)
def test_what_cannot_end_well_is_told_before_the_first_photo(
    words: list[str], said: str, photos: Path, cache: FeatureStore
) -> None:
    (photos / "red" / "broken.png").touch()
    result = run("fit", photos, *MICRO, *words, code=2)
    assert said in result.stderr
    assert "broken.png" not in result.stderr
    assert cache.info()["computed"] == 0


# Ctrl-C


def started(photos: Path, *more: object) -> subprocess.Popen:
    words = ["fit", photos, "-o", "m.joblib", *MICRO, "--image-size", 64, *more]
    command = [sys.executable, "-u", "-m", "featx", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen, words: str) -> str:
    """What stderr says up to a line with these words."""
    assert process.stderr is not None
    told = ""
    for line in process.stderr:
        told += line
        if words in line:
            return told
    raise AssertionError(told)


@pytest.fixture
def long_search(tmp_path: Path) -> subprocess.Popen:
    """One whose probe is judged, and which trains networks for minutes."""
    process = started(write_photos(tmp_path / "many", 240, seed=1))
    wait_for(process, "lda")
    time.sleep(1)
    return process


def test_ctrl_c_ends_the_search_and_writes_what_is_best_by_then(long_search: subprocess.Popen, tmp_path: Path) -> None:
    long_search.send_signal(signal.SIGINT)
    said, told = long_search.communicate(timeout=120)
    assert long_search.returncode == 0, told
    assert "Interrupted: the search ends" in told
    assert "last-two-flip: the search was interrupted" in told
    assert "mean: the search was interrupted" in told
    assert "Model: m.joblib" in said
    assert joblib.load("m.joblib").best_recipe_ in ("probe", "layers", "lda")
    run("predict", "m.joblib", tmp_path / "many")


def test_ctrl_c_twice_writes_nothing(photos: Path, tmp_path: Path) -> None:
    # The first comes as the mean is judged, when there is no recipe left to end; the second while the model is learnt.
    slowly = """if 1:
        import signal, sys, time
        from featx.choosing.search import Search
        from featx.cli import main
        Search._judge_mean = lambda self, entry: None if self.is_interrupted else signal.raise_signal(signal.SIGINT)
        Search.refit = lambda self, entry: time.sleep(60)
        main()
    """
    words = ["fit", photos, "-o", "m.joblib", *MICRO, "--time-budget", 0]
    command = [sys.executable, "-u", "-c", slowly, *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(process, "Interrupted: the search ends")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert not [*tmp_path.glob("*.joblib"), *tmp_path.glob(".*.part")]


def test_ctrl_c_before_anything_is_judged_writes_nothing(tmp_path: Path, cache: FeatureStore) -> None:
    process = started(write_photos(tmp_path / "many", 400, seed=1), "--batch-size", 1)
    while cache.info()["computed"] < 24 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "rows of features are kept" in told
    assert not Path("m.joblib").exists()


def test_ctrl_c_while_a_network_is_trained_for_numbers_takes_the_linear_model(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"{path},{i}" for i, path in enumerate(sorted(photos.glob("*/*")))]
    Path("t.csv").write_text("\n".join(["file,n", *rows]))
    monkeypatch.setattr(FineTuneRegressor, "fit", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    words = ["fit", "t.csv", "--image", "file", "--label", "n", "--task", "regression", "-o", "m.joblib", *MICRO]
    result = run(*words, "--quiet")
    assert "Interrupted: the search ends. What is best so far, the linear model" in result.stderr
    assert "the network was not judged: the search was interrupted" in result.stdout
    run("predict", "m.joblib", photos)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_the_model_is_learnt(times: int, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featx.choosing.search import Search

    refit = Search.refit

    def pressed(self: Search, *given: Any) -> Any:
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return refit(self, *given)

    monkeypatch.setattr(Search, "refit", pressed)
    words = ["fit", photos, "-o", "m.joblib", *MICRO, "--time-budget", 0]
    result = run(*words, code=0 if times == 1 else 130)
    assert _LATE in result.stderr
    assert Path("m.joblib").exists() == (times == 1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
