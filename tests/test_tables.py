"""Laws of tables: what stands in one is learnt whatever its form, and what is wrong with one is told in a sentence."""

from __future__ import annotations

import csv
import html
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
from commands import run, run_json
from pictures import encode
from sklearn.model_selection import StratifiedGroupKFold

from featx import FeatureStore
from featx.cli import ways
from featx.cli.options import Columns
from featx.cli.table_forms import opened

MICRO = ["--backbone", "featx_micro"]
COLUMNS = ["--image", "file", "--label", "breed"]
N = 24


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def frame(tmp_path: Path) -> pd.DataFrame:
    """Red and blue photos, all in one folder, and a table of them."""
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "photos").mkdir(parents=True)
    rows = []
    for i in range(N):
        pixels = rng.integers(0, 120, size=(32, 32, 3), dtype=np.uint8)
        pixels[..., 0 if i % 2 else 2] += 10 * i % 120 + 15
        name = f"photos/{i:02}.{'JPG' if i % 3 else 'png'}"
        (tmp_path / "data" / name).write_bytes(encode(pixels, "JPEG" if i % 3 else "PNG"))
        rows.append({"id": i, "file": name, "breed": "rosso, è" if i % 2 else "1", "dog": f"dog {i // 4}", "kg": i / 2})
    return pd.DataFrame(rows)


def write(frame: pd.DataFrame, path: Path) -> Path:
    writers = {
        ".csv": lambda: frame.to_csv(path, index=False),
        ".tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        ".parquet": lambda: frame.to_parquet(path, index=False),
        ".jsonl": lambda: frame.to_json(path, orient="records", lines=True),
    }
    writers[path.suffix.lower()]()
    return path


FORMS = {
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "semicolons": lambda frame, path: frame.to_csv(path, index=False, sep=";"),
    "with a mark": lambda frame, path: frame.to_csv(path, index=False, encoding="utf-8-sig"),
    "utf-16": lambda frame, path: frame.to_csv(path, index=False, encoding="utf-16", sep="\t"),
    "windows-1252": lambda frame, path: frame.to_csv(path, index=False, encoding="cp1252", sep=";"),
    "windows' lines": lambda frame, path: frame.to_csv(path, index=False, lineterminator="\r\n"),
    "all in quotes": lambda frame, path: frame.to_csv(path, index=False, quoting=csv.QUOTE_ALL),
    "spaces around names": lambda frame, path: path.write_text(
        frame.to_csv(index=False).replace("id,file,breed", "id , file , breed", 1)
    ),
    "empty lines": lambda frame, path: path.write_text(frame.to_csv(index=False).replace("\n", "\n\n") + ",,,,\n"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_text_tables_say_the_same(form: str, frame: pd.DataFrame, tmp_path: Path) -> None:
    FORMS[form](frame, tmp_path / "data" / "t.CSV")
    file = opened("data/t.CSV")
    assert file.names() == frame.columns.tolist()
    wanted = frame[["file", "breed"]].to_numpy().tolist()
    assert list(file.rows(["file", "breed"])) == wanted
    assert bool(file.remark) == (form == "windows-1252")
    if form != "spaces around names":
        again = eval(file.code(), {"pd": pd})
        assert again.dropna(subset=["file"])[["file", "breed"]].to_numpy().tolist() == wanted


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet", "jsonl"])
def test_a_model_from_a_table_is_that_of_the_folders(
    ending: str, frame: pd.DataFrame, tmp_path: Path, cache: FeatureStore
) -> None:
    table = write(frame, tmp_path / "data" / f"labels.{ending}")
    found = run_json("fit", table, *COLUMNS, "-o", "table.joblib", *MICRO, "--quick")
    assert found["classes"] == ["1", "rosso, è"]
    for path, label in zip(frame["file"], frame["breed"], strict=True):
        (tmp_path / "folders" / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "data" / path, tmp_path / "folders" / label)
    run("fit", "folders", "-o", "folders.joblib", *MICRO, "--quick")
    paths = [str(tmp_path / "data" / path) for path in frame["file"]]
    first, second = (joblib.load(f"{name}.joblib").predict_proba(paths) for name in ("table", "folders"))
    # The rows come in another order, and so do the folds, which may choose another C or layer.
    np.testing.assert_array_equal(first.argmax(axis=1), second.argmax(axis=1))
    assert cache.info()["computed"] == N


def test_all_commands_take_tables(frame: pd.DataFrame, tmp_path: Path, cache: FeatureStore) -> None:
    table = write(frame, tmp_path / "elsewhere.parquet")
    root = ["--root", "data"]
    run("fit", table, *COLUMNS, *root, "-o", "m.joblib", *MICRO, "--layers", "-1")
    search = run_json("search", table, *COLUMNS, *root, "--backbones", "featx_micro", "--report", "r.html")
    assert search["leaderboard"][0]["accuracy"] > 0.9
    told = run_json("predict", "m.joblib", table, "--image", "file", *root)
    assert [Path(row["path"]).name for row in told["predictions"]] == [Path(name).name for name in frame["file"]]
    run("extract", table, "--image", "file", *root, "-o", "f.parquet", *MICRO)
    assert pyarrow.parquet.read_table("f.parquet", columns=["path"])["path"].to_pylist() == [
        f"data/{name}" for name in frame["file"]
    ]
    scored = run_json("score", "m.joblib", table, *COLUMNS, *root)
    assert (scored["n_used"], scored["accuracy"]) == (N, 1.0)
    assert cache.info()["computed"] == N
    next_command = shlex.split(
        run("search", table, *COLUMNS, *root, "--backbones", "featx_micro").stdout.partition("Next: ")[2]
    )
    run(*next_command[1:])


def test_report_of_a_table_gives_code_that_finds_the_accuracy(
    frame: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame.loc[3, "breed"] = None
    (tmp_path / "data" / "photos" / "05.JPG").write_bytes(b"none")
    frame = pd.concat([frame, frame.iloc[[0]]])
    frame.to_csv("data/t.csv", sep=";", index=False)
    found = run_json("search", "data/t.csv", *COLUMNS, "--backbones", "featx_micro", "--report", "r.html")
    *_, code = re.findall(r"<code>(.*?)</code>", Path("r.html").read_text(), flags=re.DOTALL)
    exec(html.unescape(code), {})
    assert float(capsys.readouterr().out) == pytest.approx(found["leaderboard"][0]["accuracy"], abs=1e-6)


# What is wrong with tables


def told(table: Path | str, *more: object, code: int) -> str:
    result = run("fit", table, *(more or COLUMNS), "-o", "m.joblib", *MICRO, "--quick", code=code)
    assert (code == 0) == Path("m.joblib").exists()
    if code:
        assert len(result.stderr.strip().splitlines()) == (1 if code == 1 else 4), result.stderr
    return result.stderr


def test_missing_photos_are_listed_and_others_learnt(frame: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "data" / frame["file"][3]).unlink()
    said = told(write(frame, tmp_path / "data" / "t.csv"), code=0)
    assert "1 photo could not be read:" in said
    assert f"data/{frame['file'][3]}: no such file" in said


def test_where_no_photo_is_there_the_folder_is_told_and_asked_for(frame: pd.DataFrame, tmp_path: Path) -> None:
    table = write(frame, tmp_path / "t.csv")
    said = told(table, code=1)
    assert f"got none of {N}, such as {tmp_path / frame['file'][0]}" in said
    assert "--root" in said
    told(table, *COLUMNS, "--root", "data", code=0)  # the advice works


def test_missing_labels_are_listed_and_others_learnt(frame: pd.DataFrame, tmp_path: Path) -> None:
    frame.loc[[3, 4], "breed"] = [None, ""]
    table = write(frame, tmp_path / "data" / "t.csv")
    said = told(table, code=0)
    assert f"{tmp_path / 'data' / frame['file'][3]} and 1 more are not used: no label in the column 'breed'" in said
    words = ["fit", table, *COLUMNS, "-o", "n.joblib", *MICRO, "--quick"]
    found = run_json(*words)
    assert [row["reason"] for row in found["broken"]] == ["no label in the column 'breed'"] * 2
    assert found["n_used"] == N - 2
    assert "has no label in the column 'breed'" in run(*words, "--strict", code=1).stderr


def test_misspelt_columns_are_told_with_those_that_there_are(frame: pd.DataFrame, tmp_path: Path) -> None:
    table = write(frame, tmp_path / "data" / "t.csv")
    said = told(table, "--image", "file", "--label", "bred", code=2)
    assert "got 'bred'. It has the columns 'id', 'file', 'breed', 'dog', 'kg'. Did you mean 'breed'?" in said
    assert "--label COLUMN is expected with a table" in told(table, "--image", "file", code=2)
    asked = run("extract", table, "-o", "f.npy", *MICRO, code=2).stderr
    assert "--image COLUMN is expected with a table" in asked


def test_rows_that_say_the_same_count_once(frame: pd.DataFrame, tmp_path: Path) -> None:
    twice = pd.concat([frame, frame.iloc[:3]])
    twice.iloc[-1, 1] = str(tmp_path / "data" / "." / frame["file"][2])
    table = write(twice, tmp_path / "data" / "t.csv")
    assert "3 rows of" in told(table, code=0)
    assert run_json("fit", table, *COLUMNS, "-o", "n.joblib", *MICRO, "--quick")["n_used"] == N


def test_a_photo_with_two_labels_is_an_error(frame: pd.DataFrame, tmp_path: Path) -> None:
    other = frame.iloc[[2]].assign(breed="x")
    said = told(write(pd.concat([frame, other]), tmp_path / "data" / "t.csv"), code=1)
    assert f"One label for each photo is expected, got {tmp_path / 'data' / frame['file'][2]} with '1' and 'x'" in said


def test_absolute_relative_and_windows_paths_are_found(frame: pd.DataFrame, tmp_path: Path) -> None:
    frame.loc[0, "file"] = str(tmp_path / "data" / frame["file"][0])
    frame.loc[1, "file"] = f"./{frame['file'][1]}"
    frame.loc[2, "file"] = frame["file"][2].replace("/", "\\")
    frame.loc[3, "file"] = f"../data/{frame['file'][3]}"
    found = run_json("fit", write(frame, tmp_path / "data" / "t.csv"), *COLUMNS, "-o", "m.joblib", *MICRO, "--quick")
    assert (found["n_used"], found["broken"]) == (N, [])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "which is empty"),
        ("file,breed\n", "Rows of photos are expected"),
        ("file,breed\n,\n , \n", "Rows of photos are expected"),
        ("file,breed\n,cat\n", "Photos are expected in the column 'file'"),
        ("file,breed\na.jpg,cat,black\n", "2 cells are expected in each line of data/t.csv, got 3 in line 2"),
        ('file,breed\na.jpg,"cat\nb.jpg,dog\n', "got something else from line 2 on: unexpected end of data"),
        ('file,breed\na.jpg,"cat"s\n', "got something else from line 2 on"),
        ("file,breed\nhttps://x/a.jpg,cat\ns3://b/c.jpg,dog\n", "got the URL https://x/a.jpg and 1 more"),
        ("file,breed\nphotos/00.png,\n", "Photos with labels are expected"),
        ("file,breed\nphotos/00.png,cat\n", "at least two classes"),
    ],
)
def test_tables_without_what_is_needed_are_told_in_a_sentence(content: str, said: str, frame: pd.DataFrame) -> None:
    Path("data/t.csv").write_text(content)
    assert said in told("data/t.csv", code=1)


def test_what_is_no_table_is_told_in_a_sentence(frame: pd.DataFrame) -> None:
    Path("t.parquet").write_text("file,breed")
    assert "A Parquet file is expected, got t.parquet" in told("t.parquet", code=1)
    for line in (b"{", b"[1]", b"", b'{"breed": "\xe9"}'):
        Path("t.jsonl").write_bytes(line)
        assert "A JSON object in each line is expected, got t.jsonl" in told("t.jsonl", code=1)
    Path("t.csv").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR")
    told("t.csv", "--image", "file", "--label", "breed", code=2)


def test_options_of_tables_and_of_folders_are_not_mixed(frame: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "folders" / "a").mkdir(parents=True)
    assert "--image goes with a table" in told("folders", "--image", "file", code=2)
    table = write(frame, tmp_path / "data" / "t.csv")
    assert "--classes goes with a folder" in told(table, *COLUMNS, "--classes", "1", code=2)


# Numbers, and groups


def test_numbers_are_learnt_and_scored(frame: pd.DataFrame, tmp_path: Path) -> None:
    table = write(frame, tmp_path / "data" / "t.csv")
    words = ["fit", table, "--image", "file", "--label", "kg", "--task", "regression", *MICRO]
    for ending, how in (("joblib", ("--quick",)), ("safetensors", ("--fine-tune", "--epochs", 2, "--folds", 2))):
        found = run_json(*words, "-o", f"m.{ending}", *how)
        assert found["scoring"] == "R2"
        assert found["mean"] == frame["kg"].mean()
        scored = run_json("score", f"m.{ending}", table, "--image", "file", "--label", "kg")
        rows = run_json("predict", f"m.{ending}", table, "--image", "file")["predictions"]
        gaps = np.array([row["label"] for row in rows]) - frame["kg"].to_numpy()
        assert scored["root_mean_squared_error"] == pytest.approx(np.sqrt(np.mean(gaps**2)), rel=1e-4)
        assert scored["mean_absolute_error"] == pytest.approx(np.abs(gaps).mean(), rel=1e-4)
        assert scored["worst"][0]["path"].endswith(frame["file"][int(np.abs(gaps).argmax())])
    under = write(frame.assign(kg="1_5"), tmp_path / "data" / "under.csv")
    assert "got '1_5' of" in run(*words[:1], under, *words[2:], "-o", "x.joblib", code=1).stderr
    said = run("fit", table, *COLUMNS, "--task", "regression", *MICRO, "-o", "x.joblib", code=1).stderr
    assert "Numbers are expected in the column 'breed'" in said
    assert "'rosso, è'" in said
    assert "got one of numbers" in run("score", "m.joblib", table, *COLUMNS, "--report", "r.html", code=2).stderr


@pytest.mark.parametrize("seconds", [0, 60])
def test_a_network_is_trained_for_numbers_where_that_is_better_beyond_doubt(
    seconds: int, frame: pd.DataFrame, tmp_path: Path
) -> None:
    table = write(frame, tmp_path / "data" / "t.csv")
    words = ["fit", table, "--image", "file", "--label", "kg", "--task", "regression", *MICRO, "-o", "m.joblib"]
    result = run(*words, "--time-budget", seconds, "--json", "--groups", "dog", "--folds", 2)
    found = json.loads(result.stdout)
    ridge, tuned = found["leaderboard"]
    assert ridge["mean"] == pytest.approx(run_json(*words, "--quick", "--groups", "dog", "--folds", 2)["R2"])
    if seconds == 0:
        assert (tuned["n_folds"], found["recipe"]) == (0, "on features")
        assert "takes longer than was foreseen" in tuned["not_tried"]
    else:
        assert tuned["n_folds"] == 2
        gain, error = map(float, re.findall(r"-?\d[\d.e+-]*\b", found["reason"]))
        assert found["recipe"] == ("fine-tuned" if gain > error else "on features")
        assert found["R2"] == (tuned if gain > error else ridge)["mean"]
    assert all(f"{row['recipe']}: " in result.stderr for row in (ridge, tuned))
    run("predict", "m.joblib", table, "--image", "file")


@pytest.mark.parametrize("how", ["--quick", "--fine-tune", "search"])
def test_groups_are_never_learnt_from_and_judged_by_at_once(
    how: str, frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write(frame, tmp_path / "data" / "t.csv")
    more = {
        "--quick": ["--quick"],
        "--fine-tune": ["--fine-tune", "--epochs", 1, "--folds", 2],
        "search": ["--time-budget", 0],
    }[how]
    words = ["fit", table, *COLUMNS, "--groups", "dog", "-o", "m.joblib", *MICRO]
    splits, split = list[tuple[np.ndarray, np.ndarray]](), StratifiedGroupKFold.split

    def noting(self: Any, X: Any, y: Any = None, groups: Any = None) -> Any:
        for pair in split(self, X, y, groups):
            splits.append(pair)
            yield pair

    monkeypatch.setattr(StratifiedGroupKFold, "split", noting)
    chosen = ways._Following.chosen

    def looking(self: Any, search: Any, entry: Any) -> None:
        splits[:] = search.task.folds
        chosen(self, search, entry)

    monkeypatch.setattr(ways._Following, "chosen", looking)
    found = run_json(*words, *more)
    dogs = frame["dog"].to_numpy()
    assert len(splits) >= found["folds"] >= 1
    assert all(not {*dogs[learnt]} & {*dogs[held_out]} for learnt, held_out in splits)


def test_a_photo_without_a_group_is_an_error(frame: pd.DataFrame, tmp_path: Path) -> None:
    frame.loc[5, "dog"] = None
    words = [*COLUMNS, "--groups", "dog"]
    said = told(write(frame, tmp_path / "data" / "t.csv"), *words, code=1)
    assert f"got none for {tmp_path / 'data' / frame['file'][5]}. Write the photo's own name" in said
    frame.loc[5, "dog"] = "05"
    told(write(frame, tmp_path / "data" / "t.csv"), *words, code=0)


def test_a_photo_with_a_label_in_one_of_its_rows_is_learnt(frame: pd.DataFrame, tmp_path: Path) -> None:
    table = write(pd.concat([frame, frame.iloc[[4]].assign(breed=None)]), tmp_path / "data" / "t.csv")
    found = run_json("fit", table, *COLUMNS, "-o", "m.joblib", *MICRO, "--quick")
    assert (found["n_used"], found["broken"]) == (N, [])


def test_labels_are_the_same_in_whatever_form_they_come(frame: pd.DataFrame, tmp_path: Path) -> None:
    odd = frame.assign(breed=["z\u00e9ro ", "1", "ze\u0301ro"] * 8)
    for ending in ("csv", "jsonl", "parquet"):
        table = write(odd, tmp_path / "data" / f"odd.{ending}")
        found = run_json("fit", table, *COLUMNS, "-o", "m.joblib", *MICRO, "--quick")
        assert found["classes"] == ["1", "z\u00e9ro"]
        assert run_json("score", "m.joblib", table, *COLUMNS)["n_used"] == N
    whole = frame.assign(breed=[0, 1] * 12)
    gaps = whole.astype({"breed": float})
    gaps.loc[3, "breed"] = np.nan
    run("fit", write(whole, tmp_path / "data" / "whole.parquet"), *COLUMNS, "-o", "m.joblib", *MICRO, "--quick")
    assert run_json("score", "m.joblib", write(gaps, tmp_path / "data" / "gaps.parquet"), *COLUMNS)["n_used"] == N - 1


def test_rows_without_a_photo_are_told_also_where_it_is_quiet(frame: pd.DataFrame, tmp_path: Path) -> None:
    frame.loc[[2, 3], "file"] = [None, ""]
    table = write(frame, tmp_path / "data" / "t.csv")
    words = ["fit", table, *COLUMNS, "-o", "m.joblib", *MICRO, "--quick"]
    assert "Left out: 2 rows of" in run(*words, "--quiet").stderr
    found = run_json(*words)
    assert (found["n_lost_rows"], found["n_photos"], found["n_used"]) == (2, N - 2, N - 2)
    assert "got 2 rows of" in run(*words, "--strict", code=1).stderr


def test_rows_that_name_a_photo_again_are_told_by_predict(frame: pd.DataFrame, tmp_path: Path) -> None:
    run("fit", write(frame, tmp_path / "data" / "t.csv"), *COLUMNS, "-o", "m.joblib", *MICRO, "--quick")
    twice = write(pd.concat([frame, frame[:2]]), tmp_path / "data" / "twice.csv")
    result = run("predict", "m.joblib", twice, "--image", "file", "--json")
    assert "2 rows of" in result.stderr
    assert len(json.loads(result.stdout)["predictions"]) == N
    assert "--image goes with a table" in run("predict", "m.joblib", "data", "--image", "file", code=2).stderr


def test_header_is_found_or_asked_for(frame: pd.DataFrame, tmp_path: Path) -> None:
    Path("data/a.tsv").write_text("\n\nfile\tbreed, a\nphotos/00.png\tcat\n")
    assert opened("data/a.tsv").names() == ["file", "breed, a"]
    assert list(opened("data/a.tsv").rows(["breed, a", "file"])) == [["cat", "photos/00.png"]]
    Path("data/b.csv").write_text("file,breed,breed\nphotos/00.png,cat,dog\n")
    assert "One column 'breed' is expected in data/b.csv, got 2" in told("data/b.csv", code=2)
    for name in ("t.json", "t.xlsx"):
        Path(name).write_text("{}")
        assert "A folder or a table (.csv, " in told(name, code=2)


def test_photos_inside_of_a_table_are_told_to_be_written_first(frame: pd.DataFrame, tmp_path: Path) -> None:
    inside = pd.DataFrame({"file": [{"bytes": b"x" * 99, "path": "a.png"}] * 4, "breed": [*"abab"]})
    said = told(write(inside, tmp_path / "t.parquet"), code=1)
    assert "got a dict. Photos inside of a table have to be written into files first" in said
    assert len(said) < 400


def test_where_a_fold_lacks_a_class_its_photos_are_wrong_and_nothing_is_lost(
    frame: pd.DataFrame, tmp_path: Path
) -> None:
    frame["breed"] = ["a", "b", "c"] * 8
    frame["dog"] = ["x" if label == "c" else f"{i % 4}" for i, label in enumerate(frame["breed"])]
    table = write(pd.concat([frame, frame[-1:].assign(dog="y")])[:N], tmp_path / "data" / "t.csv")
    words = ["fit", table, *COLUMNS, "--groups", "dog", "-o", "m.joblib", *MICRO, "--report", "r.html"]
    frame.loc[2, "dog"] = "y"  # two groups have c, one of them a single photo
    write(frame, tmp_path / "data" / "t.csv")
    for how in (["--quick"], ["--fine-tune", "--epochs", 1, "--folds", 2], ["--time-budget", 0]):
        found = run_json(*words, *how)
        assert found["classes"] == ["a", "b", "c"]


def test_a_score_that_the_labels_cannot_have_is_told_before_the_first_photo(
    frame: pd.DataFrame, tmp_path: Path, cache: FeatureStore
) -> None:
    table = write(frame, tmp_path / "data" / "t.csv")
    for scoring in ("f1", "r2"):
        words = ["fit", table, *COLUMNS, "-o", "m.joblib", *MICRO, "--scoring", scoring]
        said = run(*words, code=1).stderr
        assert f"got --scoring '{scoring}', which fails in fold 0" in said
        assert len(said.strip().splitlines()) == 1
    assert cache.info()["computed"] == 0


def test_columns_are_typed_as_they_were_given() -> None:
    assert Columns("a b", "c", root="d").words() == ["--image", "a b", "--label", "c", "--root", "d"]
