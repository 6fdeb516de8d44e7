"""Laws of the report: what it says is true, what strangers named stays text, and it opens by itself and anywhere."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import runner
from pictures import encode
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import featx.cli.report.charts
from featx import FeatureStore, PretrainedFeatureExtractor, list_layers, load_image_folder
from featx.cli.commands import featx as command_line
from featx.cli.found import Found
from featx.cli.report import write_report

BROWSERS = ("chromium", "google-chrome")
SCRIPT = "<script>alert(1)</script>"
HOSTILE = '"><img src=x onerror=alert(2)> & {{ 7 * 7 }} $x^2$.jpg'
WIDTHS = {"desktop": 1280, "phone": 390}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path / "cache"))
    return FeatureStore(tmp_path / "cache")


def noisy(red: bool, rng: np.random.Generator) -> np.ndarray:
    """A picture of one of two classes, so noisy that some are mistaken."""
    pixels = rng.integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
    pixels[..., 0 if red else 2] //= 2
    pixels[:, : rng.integers(8, 33)] = rng.integers(0, 256, size=3)
    return pixels


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for label, red in (("red & <b>", True), ("blue", False)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(16):
            (tmp_path / "photos" / label / f"{i:02}{HOSTILE}").write_bytes(encode(noisy(red, rng), "JPEG"))
    return tmp_path / "photos"


def search(photos: Path, report: Path, *more: str, code: int = 0) -> dict[str, Any]:
    words = ["search", str(photos), "--backbones", "featx_micro", "--poolings", "avg,max", "--report", str(report)]
    result = runner().invoke(command_line, [*words, *more, "--json"])
    assert result.exit_code == code, (result.output, result.exception)
    return json.loads(result.stdout) if code == 0 else {"stderr": result.stderr}


@pytest.fixture
def found(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Found:
    """What a search hands to the report."""
    taken: list[Found] = []
    with monkeypatch.context() as patched:
        patched.setattr(featx.cli.report, "write_report", lambda found, path: taken.append(found))
        search(photos, tmp_path / "none.html")
    return taken[0]


class Page(HTMLParser):
    """Text, and what a browser would do something about."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.blocks: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "code":
            self.blocks.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if "code" in self.open and self.open[-1] == "code":
            self.blocks[-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def test_report_says_what_the_search_found(photos: Path, tmp_path: Path, cache: FeatureStore) -> None:
    told = search(photos, tmp_path / "report.html")
    assert told["report"] == str(tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    best = told["leaderboard"][0]
    assert (
        f"Of {len(told['leaderboard'])} choices featx_micro , layer {best['layer']} with {best['pooling']} pooling did "
        f"best: accuracy {best['accuracy']:.3f} ± {best['spread']:.3f} over 5 folds, " in page.text
    )
    assert "32 photos of 2 classes: blue 16, red & <b> 16." in page.text
    assert np.mean(best["fold_accuracies"]) == pytest.approx(best["accuracy"])
    (effort,) = told["efforts"]
    assert f"1.00 {effort['pass_seconds']:.1f} {effort['scoring_seconds']:.1f}" in page.text
    rows = re.findall(r"(\d+) (\d\.\d{3}) featx_micro (\S+) (avg|max) \S+ ± (\d\.\d{3})", page.text)
    expected = [
        (str(place), f"{row['accuracy']:.3f}", row["layer"], row["pooling"], f"{row['spread']:.3f}")
        for place, row in enumerate(told["leaderboard"], 1)
    ]
    assert rows == expected
    assert "featx_micro 1.00" in page.text  # passes per photo
    search(photos, tmp_path / "again.html")
    assert "featx_micro 0.00 (cached)" in Page(tmp_path / "again.html").text
    assert cache.info()["computed"] == 32


def predictions_of(photos: Path, best: dict[str, Any], n_folds: int = 5) -> tuple[Any, np.ndarray, np.ndarray]:
    """Held-out predictions as a user of scikit-learn would make them."""
    data = load_image_folder(photos, shuffle=False)
    features = PretrainedFeatureExtractor(best["backbone"], layers=best["layer"], pooling=best["pooling"])
    model = make_pipeline(features, StandardScaler(), LogisticRegression(C=best["C"], max_iter=5000))
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=0)
    proba = cross_val_predict(model, data.data, data.target, cv=folds, method="predict_proba")
    return data, proba.argmax(axis=1), proba.max(axis=1)


def test_confusions_and_mistakes_are_those_of_held_out_photos(photos: Path, tmp_path: Path) -> None:
    best = search(photos, tmp_path / "report.html")["leaderboard"][0]
    data, predicted, confidence = predictions_of(photos, best)
    page = Page(tmp_path / "report.html")
    matrix = confusion_matrix(data.target, predicted)
    assert f"over 5 folds, {(predicted != data.target).sum()} of 32 photos wrong." in page.text
    shares = [float(share) for share in re.findall(r'shade" style="--share: ([\d.]+)"', page.source)]
    np.testing.assert_allclose(shares, (matrix / matrix.sum(axis=1, keepdims=True)).ravel(), atol=1e-3)
    assert all(f"{name} {a} {b}" in page.text for name, (a, b) in zip(data.target_names, matrix, strict=True))
    wrong = np.flatnonzero(predicted != data.target)
    assert len(wrong) >= 2
    worst = sorted(wrong.tolist(), key=lambda row: -confidence[row])
    shown = [
        f"taken for {data.target_names[predicted[row]]} , {100 * confidence[row]:.1f} % "
        f"true: {data.target_names[data.target[row]]} {' '.join(os.path.relpath(data.data[row], photos).split())}"
        for row in worst
    ]
    places = [page.text.index(words) for words in shown]
    assert places == sorted(places)
    assert page.text.count("taken for") == len(wrong)


def test_nearest_photos_are_nearest_and_thumbnails_show_them(found: Found, photos: Path, tmp_path: Path) -> None:
    write_report(found, tmp_path / "report.html")
    best = found.best
    features = PretrainedFeatureExtractor(best.backbone, layers=best.layer, pooling=best.pooling)
    rows = features.transform(found.photos.paths)
    _, predicted, confidence = predictions_of(photos, asdict(best))
    right = np.where(found.classes == found.photos.y[:, None], 1, 0).argmax(axis=1) == predicted
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    names = [os.path.relpath(path, photos) for path in found.photos.paths]
    page = (tmp_path / "report.html").read_text()
    galleries = re.findall(r'<ul class="gallery row">(.*?)</ul>', page, flags=re.DOTALL)
    assert len(galleries) == 2
    for gallery in galleries:
        seen = Page(_as_file(tmp_path, gallery))
        alts = [str(image["alt"]) for image in seen.images()]
        query, *nearest = [names.index(alt.split(": ", 1)[1]) for alt in alts]
        rivals = np.flatnonzero(right & (found.photos.y == found.photos.y[query]))
        assert query == rivals[confidence[rivals].argmax()]
        shown = [float(distance) for distance in re.findall(r"distance (\d\.\d\d)", seen.text)]
        np.testing.assert_allclose(shown, 1 - rows[nearest] @ rows[query], atol=0.006)
        order = [row for row in np.argsort(-(rows @ rows[query]), kind="stable").tolist() if row != query]
        assert nearest == order[:5]
        for row, image in zip([query, *nearest], seen.images(), strict=True):
            pixels = Image.open(io.BytesIO(base64.b64decode(str(image["src"]).partition("base64,")[2])))
            wanted = np.asarray(Image.open(found.photos.paths[row]), dtype=float)
            assert np.abs(np.asarray(pixels, dtype=float) - wanted).mean() < 25  # compressed once more


def _as_file(folder: Path, text: str) -> Path:
    (folder / "part.html").write_text(text)
    return folder / "part.html"


def test_python_in_the_report_finds_the_accuracy_again(photos: Path, tmp_path: Path, capsys: Any) -> None:
    (photos / "blue" / "broken it's.jpg").write_text("no picture")
    reading = ("--image-size", "40", "--precision", "bfloat16", "--weights", "none")
    told = search(photos, tmp_path / "report.html", *reading)
    page = Page(tmp_path / "report.html")
    *_, command, fit, code = page.blocks
    exec(compile(code, "report", "exec"), {})
    assert float(capsys.readouterr().out) == pytest.approx(told["leaderboard"][0]["accuracy"], abs=1e-12)
    program, *words = shlex.split(command)
    assert program == "featx"
    (tmp_path / "report.html").unlink()
    again = runner().invoke(command_line, words)
    assert json.loads(again.stdout)["leaderboard"] == told["leaderboard"]
    assert (tmp_path / "report.html").exists()
    assert told["leaderboard"][0]["weights"] is None
    assert "featx_micro (random)" in page.text
    fitted = runner().invoke(command_line, [*shlex.split(fit)[1:], "-o", str(tmp_path / "m.joblib"), "--json"])
    assert json.loads(fitted.stdout)["accuracy"] == told["leaderboard"][0]["accuracy"]
    (broken,) = told["broken"]
    assert f"{broken['path']} : {broken['reason']}" in page.text


def test_python_in_the_report_names_weights_as_they_were_typed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = PretrainedFeatureExtractor("featx_micro")._spec()
    torch.save({"ema": spec.load("cpu", torch.float32).module.state_dict()}, "last.ckpt")
    search(photos, tmp_path / "report.html", "--weights", "last.ckpt#ema")
    page = Page(tmp_path / "report.html")
    assert "weights=('last.ckpt', 'ema')" in page.blocks[-1]
    assert "--weights last.ckpt#ema" in page.blocks[-2].replace("'", "")


def fit(*words: str) -> dict[str, Any]:
    result = runner().invoke(command_line, ["fit", *words, "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.mark.parametrize("how", ["--quick", "--fine-tune", "search"])
def test_report_of_a_model_shows_where_it_looked_and_what_was_tried(how: str, photos: Path, tmp_path: Path) -> None:
    (photos / "blue" / "broken.jpg").write_bytes(b"none")
    more = {"--quick": ["--quick"], "--fine-tune": ["--fine-tune", "--epochs", "1"], "search": ["--time-budget", "0"]}
    report = tmp_path / "report.html"
    words = [str(photos), "-o", str(tmp_path / "m.joblib"), "--backbone", "featx_micro"]
    found = fit(*words, *more[how], "--report", str(report))
    assert found["report"] == str(report)
    page = Page(report)
    right, n = map(int, re.search(r"(\d+) of (\d+) photos, and 1 that could not be read", page.text).groups())  # type: ignore[union-attr]
    if how == "search":  # by as many folds as there was time for
        for row in found["leaderboard"]:
            assert row["recipe"] in page.text
            assert row["not_tried"] in page.text
        assert found["reason"] in page.text
    else:
        assert n == 32
        assert right / n == pytest.approx(found["accuracy"], abs=0.03)  # folds may be of several sizes
    maps = [image for image in page.images() if image.get("class") == "map"]
    assert n > right
    # The penultimate layer of this network, which the search has no time to leave, is the maximum over places.
    assert len(maps) == (0 if how == "search" else n - right)
    assert {str(image["alt"]) for image in maps} <= {
        "What speaks for blue, and for red & <b>",
        "What speaks for red & <b>, and for blue",
    }
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert " ".join(HOSTILE.split()) in page.text
    # Where no map can be drawn it is said once.
    fit(*words, "--layers", "0,1", "--pooling", "max", "--report", str(report))
    page = Page(report)
    assert page.text.count("Where the model looked can be shown of") == 1
    assert not [image for image in page.images() if image.get("class") == "map"]


def with_label(found: Found, label: str) -> Found:
    y = np.where(found.photos.y == "blue", label, found.photos.y)
    return replace(found, photos=replace(found.photos, y=y))


def test_strangers_words_stay_text(found: Found, tmp_path: Path) -> None:
    write_report(with_label(found, SCRIPT), tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert SCRIPT in page.text
    assert "red & <b>" in page.text
    assert " ".join(HOSTILE.split()) in page.text
    assert "Content-Security-Policy" in page.source


def test_nothing_is_fetched(photos: Path, tmp_path: Path) -> None:
    search(photos, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "video", "audio"}
    addresses = [str(attributes[name]) for _, attributes in page.tags for name in ("src", "href") if name in attributes]
    assert len(addresses) > 10
    assert all(address.startswith("data:image/") for address in addresses)
    assert not re.search(r"url\(|@import", (tmp_path / "report.html").read_text())


def test_charts_show_the_scores_of_every_choice(found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    plot = featx.cli.report.charts.LayerScoreDisplay.plot
    monkeypatch.setattr(
        featx.cli.report.charts.LayerScoreDisplay, "plot", lambda self, ax: (drawn.append(self), plot(self, ax))[1]
    )
    write_report(found, tmp_path / "report.html")
    (display,) = drawn
    assert list(display.layers) == [*list_layers("featx_micro"), "penultimate"]
    assert list(display.poolings) == ["avg", "max"]
    for score in found.ranked:
        line, place = display.poolings.index(score.pooling), display.layers.index(score.layer)
        np.testing.assert_array_equal(display.scores[line, place], score.fold_accuracies)
    (chart,) = [image for image in Page(tmp_path / "report.html").images() if "svg" in str(image["src"])]
    svg = base64.b64decode(str(chart["src"]).partition("base64,")[2]).decode()
    assert svg.count("currentColor") > 10
    assert featx.cli.report.charts._INK not in svg


def test_long_lists_are_cut_or_folded(photos: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for label in ("red & <b>", "blue"):  # eighty pictures that nobody can tell apart
        for i in range(40):
            (photos / label / f"grey {i}.jpg").write_bytes(
                encode(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8), "JPEG")
            )
    told = search(
        photos, tmp_path / "report.html", "--poolings", "avg,max,gem", "--layers", "all,features.1,features.3"
    )
    page = Page(tmp_path / "report.html")
    n_wrong = int(re.search(r"(\d+) of 112 photos wrong", page.text)[1])  # type: ignore[index]
    assert n_wrong > 24
    assert len(re.findall(r"taken for [^,]+, \d", page.text)) == 24
    assert f"The 24 of {n_wrong} photos" in page.text
    places = [int(place) for place in re.findall(r"(\d+) \d\.\d{3} featx_micro", page.text)]
    assert places == list(range(1, len(told["leaderboard"]) + 1))
    assert f"The other {len(places) - 12}" in page.text


def test_names_that_are_no_text_are_escaped(photos: Path, tmp_path: Path) -> None:
    os.rename(os.fsencode(photos / "blue"), os.fsencode(photos) + b"/bl\xff")
    search(photos, tmp_path / "report.html")
    assert r"bl\udcff 16" in Page(tmp_path / "report.html").text


def test_what_is_kept_nowhere_is_counted_all_the_same(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path / "file" / "below"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = search(photos, tmp_path / "report.html", "--layers", "0,1")
    passes = told["efforts"][0]["n_computed"] / 32
    assert passes >= 1
    assert f"featx_micro {passes:.2f}" in Page(tmp_path / "report.html").text


def test_many_classes_are_told_as_pairs(tmp_path: Path) -> None:
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    for label in range(26):
        (photos / f"class {label}").mkdir(parents=True)
        for i in range(4):
            (photos / f"class {label}" / f"{i}.jpg").write_bytes(encode(noisy(i % 2 == 0, rng), "JPEG"))
    told = search(photos, tmp_path / "report.html", "--layers", "0")
    data, predicted, _ = predictions_of(photos, told["leaderboard"][0], n_folds=4)
    page = Page(tmp_path / "report.html")
    matrix = confusion_matrix(data.target, predicted)
    np.fill_diagonal(matrix, 0)
    told = re.findall(r"(class \d+) (class \d+) (\d+)(?= class| Mistakes)", page.text)
    assert len(told) == min(30, np.count_nonzero(matrix))
    assert [int(n) for *_, n in told] == np.sort(matrix, axis=None)[::-1][: len(told)].tolist()
    names = data.target_names
    assert all(matrix[names.index(label), names.index(taken)] == int(n) for label, taken, n in told)
    assert (tmp_path / "report.html").stat().st_size < 3e6


def test_failed_report_leaves_the_older_one(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, write_text = tmp_path / "report.html", Path.write_text
    report.write_text("older")

    def full(path: Path, text: str, **how: Any) -> int:
        write_text(path, text[: len(text) // 2], **how)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left" in search(photos, report, code=1)["stderr"]
    assert report.read_text() == "older"
    assert sorted(tmp_path.glob("*report*")) == [report]


def test_wrong_report_is_told_before_anything_is_computed(
    photos: Path, tmp_path: Path, cache: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "ends with .html" in search(photos, tmp_path / "report.pdf", code=2)["stderr"]
    assert "does not exist" in search(photos, tmp_path / "nowhere" / "report.html", code=2)["stderr"]
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.axes", None)
    assert 'pip install "featx[plots]"' in search(photos, tmp_path / "report.html", code=1)["stderr"]
    assert cache.info()["computed"] == 0


# In a browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("FEATX_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as session:
        if path is None and not os.path.exists(session.chromium.executable_path):
            pytest.skip("no Chromium here: install one, or run .venv/bin/playwright install chromium")
        try:
            opened = session.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"Chromium does not start: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


def open_page(browser: Any, file: Path, scheme: str, width: int, **more: Any) -> tuple[Any, list[str]]:
    """A page that is shown in full, and what it complained of or asked for."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, **more)
    noise: list[str] = []
    page.on("console", lambda message: noise.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: noise.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (noise.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: noise.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(file.as_uri())
    for picture in page.locator("img").all():
        picture.scroll_into_view_if_needed()
    page.wait_for_function("[...document.images].every(image => image.complete)")
    return page, noise


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", list(WIDTHS))
def test_report_opens_alone_on_every_screen(
    browser: Any, found: Found, tmp_path: Path, device: str, scheme: str
) -> None:
    write_report(with_label(found, SCRIPT), tmp_path / "report.html")
    page, noise = open_page(browser, tmp_path / "report.html", scheme, WIDTHS[device])
    assert noise == [(tmp_path / "report.html").as_uri()]
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert page.evaluate("document.scripts.length") == 0
    assert page.get_by_text(SCRIPT, exact=True).count() >= 2
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[device]
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("of", ["search", "model"])
def test_report_can_be_read_by_all(browser: Any, found: Found, tmp_path: Path, scheme: str, of: str) -> None:
    """No rule of axe is broken: names of pictures, order of headings, contrast, tables, scrolling by keyboard."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    if of == "search":
        write_report(with_label(found, SCRIPT), tmp_path / "report.html")
    else:
        words = [found.source.path, "-o", str(tmp_path / "m.joblib"), "--backbone", "featx_micro", "--time-budget", "0"]
        fit(*words, "--report", str(tmp_path / "report.html"))
    page, _ = open_page(browser, tmp_path / "report.html", scheme, WIDTHS["phone"], bypass_csp=True)
    broken = axe.run(page).response["violations"]
    assert not [(rule["id"], rule["nodes"][0]["html"]) for rule in broken]
    page.close()
