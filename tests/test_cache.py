"""What the cache promises to whoever uses the extractor: one pass per image, and never another row."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SQUEEZENET, counting_images, relative_difference
from networks import InPlace
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from featx import FeatureStore, PretrainedFeatureExtractor
from featx.exceptions import ImageError, StoreWarning, WeightsError
from featx.images.items import PathItem
from featx.store import index, session
from featx.store.memory import MEMORY, MOST_FILES, Memory
from featx.store.owners import LEASE_S
from featx.store.session import Session

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, size=(20, 40, 50, 3), dtype=np.uint8)
PLAIN = PretrainedFeatureExtractor("featx_micro", batch_size=8)


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither rows nor warnings of an earlier test; files count as settled at once."""
    MEMORY.clear()
    session._WARNED.clear()
    monkeypatch.setattr(index, "TRUST_AFTER_S", 0.0)


@pytest.fixture
def cached(tmp_path: Path) -> PretrainedFeatureExtractor:
    return clone(PLAIN).set_params(cache=str(tmp_path / "store"))


def computed(extractor: PretrainedFeatureExtractor) -> int:
    store = extractor.cache
    return (store if isinstance(store, FeatureStore) else FeatureStore(store)).info()["computed"]


def run_python(code: str, *arguments: str) -> str:
    """Output of a new process."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# One pass


@pytest.mark.parametrize(
    "parameters",
    [
        {"layers": "penultimate"},
        {"layers": "all", "pooling": "max", "normalize": "l2"},
        {"layers": [2, 0], "pooling": "gem", "normalize": "signed-sqrt"},
        {"layers": 1, "grid": 2},
        {"layers": [1, 2], "pooling": "map"},
        {"layers": ["features.1.conv", -1], "pooling": "flatten"},
    ],
)
def test_cached_features_are_the_features(cached: PretrainedFeatureExtractor, parameters: dict) -> None:
    expected = clone(PLAIN).set_params(**parameters).transform(IMAGES)
    cached.set_params(**parameters)
    for _ in range(2):
        assert relative_difference(cached.transform(IMAGES), expected) < 1e-5
        MEMORY.clear()  # the second time from the disk
    assert relative_difference(np.concatenate(list(cached.iter_transform(IMAGES))), expected) < 1e-5


def test_stages_and_poolings_cost_one_pass_whatever_the_order(cached: PretrainedFeatureExtractor) -> None:
    order = RNG.permutation(len(IMAGES))
    with counting_images("FeatxMicro") as batches:
        cached.transform(IMAGES[:13])
        for layers in ("penultimate", 0, [1, 2], "all"):
            for pooling in ("avg", "max", "gem"):
                cached.set_params(layers=layers, pooling=pooling, normalize="l2").transform(IMAGES[order])
        cached.transform(IMAGES[5:9])
        cached.transform(np.concatenate([IMAGES, IMAGES]))
    assert sum(batches) == len(IMAGES) == computed(cached)


def test_what_a_pass_does_not_keep_costs_one_more(cached: PretrainedFeatureExtractor) -> None:
    cached.transform(IMAGES)
    for _ in range(2):
        cached.set_params(layers=1, grid=2).transform(IMAGES)
    assert computed(cached) == 2 * len(IMAGES)
    # Images that lack both are passed once.
    cached.transform(255 - IMAGES)
    cached.set_params(layers="all", grid=1).transform(255 - IMAGES)
    assert computed(cached) == 3 * len(IMAGES)


def test_keep_says_what_one_pass_keeps(tmp_path: Path) -> None:
    widths = {}
    for keep in ("asked", "stages", "blocks"):
        store = FeatureStore(tmp_path / keep, keep=keep)
        extractor = clone(PLAIN).set_params(cache=store, layers=1)
        extractor.transform(IMAGES)
        extractor.set_params(layers=2).transform(IMAGES)
        extractor.set_params(layers="features.1").transform(IMAGES)  # a block inside a stage
        widths[keep] = computed(extractor) // len(IMAGES)
    assert widths == {"asked": 3, "stages": 2, "blocks": 1}


def test_warm_fills_in_named_layers_in_one_pass(cached: PretrainedFeatureExtractor) -> None:
    assert cached.warm(IMAGES, layers=["features.1", "features.3"]) is cached
    assert computed(cached) == len(IMAGES)
    for layers in ("features.1", "features.3", "all", "penultimate"):
        cached.set_params(layers=layers, pooling="max").transform(IMAGES)
    assert computed(cached) == len(IMAGES)
    with pytest.raises(ValueError, match="cache=None"):
        clone(PLAIN).warm(IMAGES)


def test_weights_without_a_head_keep_what_can_be_read(tmp_path: Path) -> None:
    state = {key: value for key, value in _micro_state().items() if not key.startswith("head")}
    save_file(state, tmp_path / "headless.safetensors")
    extractor = clone(PLAIN).set_params(weights=str(tmp_path / "headless.safetensors"), cache=str(tmp_path / "store"))
    for layers in (0, "all"):
        extractor.set_params(layers=layers).transform(IMAGES)
    assert computed(extractor) == len(IMAGES)


def test_grid_search_in_processes_computes_each_image_once(tmp_path: Path) -> None:
    extractor = PretrainedFeatureExtractor("featx_micro", batch_size=4, cache=str(tmp_path))
    model = make_pipeline(extractor, LogisticRegression(max_iter=1000))
    X = RNG.integers(0, 256, size=(60, 32, 32, 3), dtype=np.uint8)
    grid = {"pretrainedfeatureextractor__layers": [0, 1, "penultimate"], "logisticregression__C": [0.1, 1.0]}
    GridSearchCV(model, grid, cv=3, n_jobs=4).fit(X, np.arange(60) % 2)
    assert computed(extractor) == 60


@pytest.mark.realdata
def test_warm_process_decodes_nothing_and_loads_no_network(ants_bees, tmp_path: Path) -> None:
    extractor = PretrainedFeatureExtractor("squeezenet1_1", weights=SQUEEZENET, cache=str(tmp_path / "store"))
    paths = list(ants_bees.data[:40])
    with counting_images("SqueezeNet") as batches:
        extractor.fit(paths).transform(paths)
    assert sum(batches) == 40
    (tmp_path / "extractor.pkl").write_bytes(pickle.dumps((extractor, paths, np.arange(40) % 2)))
    run_python(
        """
        import pickle, sys
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV
        from sklearn.pipeline import make_pipeline
        import featx.backbones.networks as networks
        import featx.images.decoding as decoding

        def refuse(*args, **kwargs):
            raise AssertionError("loaded or decoded")

        networks.build_with_weights = decoding.decode = refuse
        extractor, paths, y = pickle.load(open(sys.argv[1], "rb"))
        grid = {
            "pretrainedfeatureextractor__layers": [-1, -2, "penultimate"],
            "pretrainedfeatureextractor__pooling": ["avg", "max", "gem"],
            "pretrainedfeatureextractor__normalize": [None, "l2"],
        }
        model = make_pipeline(extractor, LogisticRegression(max_iter=5000))
        GridSearchCV(model, grid, cv=2, error_score="raise").fit(paths[::-1], y)
        """,
        str(tmp_path / "extractor.pkl"),
    )
    assert computed(extractor) == 40


# What a key covers


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.fromarray(IMAGES[0]).save(path, quality=95)
    return path


def _is_new(extractor: PretrainedFeatureExtractor, X: object) -> bool:
    """Whether the images of X are computed, and in any case right."""
    before = computed(extractor)
    expected = clone(extractor).set_params(cache=None).transform(X)
    assert relative_difference(extractor.transform(X), expected) < 1e-5  # with what this process remembers
    after = computed(extractor)
    MEMORY.clear()
    assert relative_difference(extractor.transform(X), expected) < 1e-5  # from the disk
    assert computed(extractor) == after
    return after > before


def test_touched_moved_and_copied_files_are_known(cached: PretrainedFeatureExtractor, photo: Path) -> None:
    assert _is_new(cached, [photo])
    os.utime(photo, (1, 1))
    assert not _is_new(cached, [photo])
    copied = photo.with_name("copy.jpg")
    shutil.copy(photo, copied)
    assert not _is_new(cached, [copied])
    photo.rename(photo.with_name("moved.jpg"))
    assert not _is_new(cached, [photo.with_name("moved.jpg"), copied, photo.with_name("moved.jpg").read_bytes()])


def test_known_files_are_not_read_again(cached: PretrainedFeatureExtractor, photo: Path, monkeypatch) -> None:
    expected = cached.transform([photo])
    monkeypatch.setattr("featx.images.items.PathItem._read", lambda self: pytest.fail("read"))
    np.testing.assert_array_equal(cached.transform([photo]), expected)
    MEMORY.clear()  # from here on from the disk
    np.testing.assert_array_equal(cached.transform([photo]), expected)


def test_edited_file_is_noticed_though_size_and_mtime_are_the_same(
    cached: PretrainedFeatureExtractor, photo: Path
) -> None:
    Image.fromarray(IMAGES[0]).save(photo, "BMP")
    status = photo.stat()
    assert _is_new(cached, [photo])
    content = bytearray(photo.read_bytes())
    content[-2000:] = bytes(255 - value for value in content[-2000:])
    time.sleep(0.02)  # ctime has the resolution of the kernel's clock
    photo.write_bytes(content)
    os.utime(photo, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (photo.stat().st_size, photo.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert _is_new(cached, [photo])


def test_edited_orientation_is_noticed(cached: PretrainedFeatureExtractor, photo: Path) -> None:
    assert _is_new(cached, [photo])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photo).save(photo, exif=exif, quality=95)
    assert _is_new(cached, [photo])


def test_relative_path_belongs_to_the_folder_it_is_read_in(
    cached: PretrainedFeatureExtractor, tmp_path: Path, monkeypatch
) -> None:
    rows = []
    for name, image in zip("ab", IMAGES, strict=False):
        (tmp_path / name).mkdir()
        Image.fromarray(image).save(tmp_path / name / "x.png")
        monkeypatch.chdir(tmp_path / name)
        rows.append(cached.transform(["x.png"]))
    assert relative_difference(rows[0], rows[1]) > 1e-3
    np.testing.assert_array_equal(cached.transform([tmp_path / "a" / "x.png"]), rows[0])
    np.testing.assert_array_equal(cached.transform([tmp_path / "b" / "x.png"]), rows[1])


def test_folder_changed_while_a_file_is_read_teaches_nothing_wrong(
    cached: PretrainedFeatureExtractor, tmp_path: Path, monkeypatch
) -> None:
    for name, image in zip("ab", IMAGES, strict=False):
        (tmp_path / name).mkdir()
        Image.fromarray(image).save(tmp_path / name / "x.png")
    expected = clone(cached).set_params(cache=None).transform([tmp_path / "a" / "x.png"])
    read = PathItem._read

    def read_elsewhere(self: PathItem) -> bytes:
        os.chdir(tmp_path / "b")
        return read(self)

    monkeypatch.chdir(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(PathItem, "_read", read_elsewhere)
        cached.transform(["x.png"])
    assert relative_difference(cached.transform([tmp_path / "a" / "x.png"]), expected) < 1e-5


def test_twin_of_a_file_that_changes_keeps_its_own_features(
    cached: PretrainedFeatureExtractor, tmp_path: Path, monkeypatch
) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path, image in zip(paths, IMAGES[[0, 0, 1, 0]], strict=True):
        Image.fromarray(image).save(path)
    load = PathItem.load_with_contents

    def load_late(self: PathItem, *seeds: int) -> tuple:
        if Path(self.path) == paths[0]:
            Image.fromarray(IMAGES[2]).save(paths[0])  # after its digest was made
        return load(self, *seeds)

    with monkeypatch.context() as patch:
        patch.setattr(PathItem, "load_with_contents", load_late)
        found = cached.transform(paths)
    assert relative_difference(found, PLAIN.transform(IMAGES[[2, 0, 1, 0]])) < 1e-5
    assert relative_difference(cached.transform(paths), PLAIN.transform(IMAGES[[2, 0, 1, 0]])) < 1e-5


def test_memory_of_files_is_bounded() -> None:
    few = Memory()
    few.add_files(1, {str(i): (b"state", b"digest") for i in range(MOST_FILES)})
    few.add_files(2, {"one more": (b"state", b"digest")})
    assert sum(len(few.files(seed)) for seed in (1, 2)) <= MOST_FILES
    assert few.files(2)["one more"] == (b"state", b"digest")
    assert few.files(3) == {}


def test_fresh_files_are_not_trusted(cached: PretrainedFeatureExtractor, photo: Path, monkeypatch) -> None:
    monkeypatch.setattr(index, "TRUST_AFTER_S", 60.0)
    for _ in range(2):
        cached.transform([photo])
    reads = []
    monkeypatch.setattr("featx.images.items.PathItem._read", lambda self: reads.append(1) or photo.read_bytes())
    cached.transform([photo])
    assert reads


def _micro_state() -> dict[str, torch.Tensor]:
    from featx.backbones.micro import FeatxMicro

    torch.manual_seed(0)
    return {key: value.contiguous() for key, value in FeatxMicro().state_dict().items()}


def test_replaced_weights_file_is_noticed(cached: PretrainedFeatureExtractor, tmp_path: Path) -> None:
    path, state = tmp_path / "weights.safetensors", _micro_state()
    save_file(state, path)
    cached.set_params(weights=str(path))
    assert _is_new(cached, IMAGES)
    state["features.0.conv.weight"][0] += 1e-2
    save_file(state, tmp_path / "new.safetensors")
    os.replace(tmp_path / "new.safetensors", path)
    assert _is_new(cached, IMAGES)
    shutil.copy(path, tmp_path / "copy.safetensors")
    assert not _is_new(cached.set_params(weights=str(tmp_path / "copy.safetensors")), IMAGES)
    assert load_file(path).keys() == state.keys()


@pytest.mark.parametrize(
    "other",
    [
        {"image_size": 24},
        {"precision": "bfloat16"},
        {"weights": None},
        {"weights": None, "random_state": 1},
        {"preprocess": "ResNet18_Weights.IMAGENET1K_V1"},
        {"pixel_range": (0, 300)},
        {"max_pixels": 10**6},
    ],
    ids=str,
)
def test_other_parameters_are_another_recipe(cached: PretrainedFeatureExtractor, other: dict) -> None:
    cached.transform(IMAGES)
    cached.set_params(weights=None).transform(IMAGES) if "random_state" in other else None
    before = computed(cached)
    cached.set_params(**other).transform(IMAGES)
    assert computed(cached) == before + len(IMAGES)


@pytest.mark.parametrize("other", [{"batch_size": 3}, {"n_jobs": 1}, {"on_error": "nan"}, {"verbose": 0}], ids=str)
def test_parameters_that_change_no_feature_change_no_key(cached: PretrainedFeatureExtractor, other: dict) -> None:
    cached.transform(IMAGES)
    cached.set_params(**other).transform(IMAGES)
    assert computed(cached) == len(IMAGES)


class Scaled(InPlace):
    """Has a setting that neither its printed form nor its tensors tell."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.scale)


def test_modules_are_known_by_their_content(cached: PretrainedFeatureExtractor) -> None:
    torch.manual_seed(0)
    module = Scaled(1.0)
    cached.set_params(backbone=module, layers="relu#2")
    assert _is_new(cached, IMAGES)
    assert not _is_new(cached.set_params(backbone=copy.deepcopy(module)), IMAGES)
    other = copy.deepcopy(module)
    other.scale = 2.0
    assert _is_new(cached.set_params(backbone=other), IMAGES)
    with torch.no_grad():
        other.conv.bias[0] += 1
    assert _is_new(cached, IMAGES)


def test_modules_are_known_in_other_processes(tmp_path: Path) -> None:
    code = """
        import sys, numpy as np, torch
        from torch import nn
        from featx import FeatureStore, PretrainedFeatureExtractor

        SCALES = {"a": (1.0, 2.0)}

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.names = nn.Conv2d(3, 4, 3), {"x", "y", "z"}

            def forward(self, x):
                return self.conv(x).mul(SCALES["a"][1]).relu()

        torch.manual_seed(0)
        extractor = PretrainedFeatureExtractor(Net(), layers="conv", cache=sys.argv[1])
        extractor.transform(np.zeros((2, 40, 40, 3), np.uint8))
        print(FeatureStore(sys.argv[1]).info()["computed"])
    """
    assert [run_python(code, str(tmp_path)) for _ in range(2)] == ["1\n", "1\n"]
    assert run_python(code.replace("(1.0, 2.0)", "(1.0, 3.0)"), str(tmp_path)) == "2\n"


def test_module_with_hooks_keeps_nothing_and_says_so(cached: PretrainedFeatureExtractor) -> None:
    module = InPlace()
    module.conv.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.warns(StoreWarning, match="hooks"):
        cached.set_params(backbone=module).transform(IMAGES)
    assert computed(cached) == 0


class Preprocess:
    def __init__(self, cache_key: str | None) -> None:
        if cache_key is not None:
            self.cache_key = cache_key

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image.resize((32, 32)))).permute(2, 0, 1) / 255


def test_callable_without_a_key_keeps_nothing_and_says_so(cached: PretrainedFeatureExtractor) -> None:
    with pytest.warns(StoreWarning, match="cache_key") as caught:
        cached.set_params(preprocess=Preprocess(None)).transform(IMAGES)
    assert len([warning for warning in caught if warning.category is StoreWarning]) == 1
    assert computed(cached) == 0


def test_callable_with_a_key_is_kept_until_the_key_changes(cached: PretrainedFeatureExtractor) -> None:
    for key, times in [("first", 1), ("first", 1), ("second", 2)]:
        cached.set_params(preprocess=Preprocess(key)).transform(IMAGES)
        assert computed(cached) == times * len(IMAGES)


def test_key_that_is_no_text_is_no_key(cached: PretrainedFeatureExtractor) -> None:
    preprocess = Preprocess(None)
    preprocess.cache_key = preprocess.__call__
    with pytest.warns(StoreWarning, match="cache_key"):
        cached.set_params(preprocess=preprocess).transform(IMAGES)


def test_module_trained_between_blocks_leaves_no_wrong_row(cached: PretrainedFeatureExtractor) -> None:
    torch.manual_seed(0)
    module = InPlace()
    original = copy.deepcopy(module)
    cached.set_params(backbone=module, layers="relu#2", batch_size=1)
    for _ in cached.iter_transform(np.concatenate([IMAGES, 255 - IMAGES])):
        with torch.no_grad():
            module.conv.weight += 0.1
    assert not _is_new(cached.set_params(backbone=original), IMAGES)


def test_file_edited_between_digest_and_decoding_is_not_kept(
    cached: PretrainedFeatureExtractor, photo: Path, monkeypatch
) -> None:
    from featx.store.session import Session

    content = photo.read_bytes()
    honest = Session.digests

    def edit_after(self: Session, *args: object) -> list:
        found = honest(self, *args)
        Image.fromarray(255 - IMAGES[0]).save(photo)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Session, "digests", edit_after)
        edited = cached.transform([photo])
    MEMORY.clear()
    assert relative_difference(edited, clone(PLAIN).transform([photo])) < 1e-5
    photo.write_bytes(content)
    assert _is_new(cached, [photo])


def test_weights_file_replaced_in_mid_call_is_an_error(
    cached: PretrainedFeatureExtractor, tmp_path: Path, monkeypatch
) -> None:
    path, state = tmp_path / "weights.safetensors", _micro_state()
    save_file(state, path)
    state["features.0.conv.weight"][0] += 1
    # Between the key and the network.
    monkeypatch.setattr("featx.activations.engine.check_weights_reach", lambda *args: save_file(state, path))
    with pytest.raises(WeightsError, match="changed"):
        cached.set_params(weights=str(path)).transform(IMAGES)
    assert computed(cached) == 0


# Bad images


def test_unreadable_images_are_tried_again_and_the_others_kept(
    cached: PretrainedFeatureExtractor, photo: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    X = [photo, broken, tmp_path / "missing.jpg", photo, broken]
    with pytest.raises(ImageError, match=r"X\[2\]"):  # a file that is not there is found out first
        cached.transform(X)
    with pytest.raises(ImageError, match=r"X\[1\]"):
        cached.transform(X[:2])
    cached.set_params(on_error="nan")
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"3 of 5 images could not be read.*X\[1\]"):
            rows = cached.transform(X)
        assert np.isnan(rows).all(axis=1).tolist() == [False, True, True, False, True]
    assert computed(cached) == 1
    shutil.copy(photo, broken)
    assert not np.isnan(cached.transform([broken])).any()


def test_error_in_a_callable_frees_what_was_claimed(
    cached: PretrainedFeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Preprocess):
        fails = True

        def __call__(self, image: Image.Image) -> torch.Tensor:
            if self.fails:
                raise ZeroDivisionError
            return super().__call__(image)

    failing = Failing("key")
    cached.set_params(preprocess=failing)
    with pytest.raises(ZeroDivisionError):
        list(cached.iter_transform(IMAGES))
    failing.fails = False
    monkeypatch.setattr(Session, "wait", lambda self: pytest.fail("what was claimed is still held"))
    cached.transform(IMAGES)


# Bad days


def _is_right_with_one_warning(extractor: PretrainedFeatureExtractor, X: object, words: str) -> None:
    expected = clone(extractor).set_params(cache=None).transform(X)
    MEMORY.clear()
    with pytest.warns(StoreWarning, match=words) as caught:
        rows = [extractor.transform(X), extractor.transform(X)]
    for found in rows:
        assert relative_difference(found, expected) < 1e-5
    assert len([warning for warning in caught if issubclass(warning.category, StoreWarning)]) == 1


def test_folder_that_is_a_file_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _is_right_with_one_warning(clone(PLAIN).set_params(cache=str(tmp_path / "file")), IMAGES, "not kept")


@pytest.mark.parametrize("what", ["recipe", "index"])
@pytest.mark.parametrize("damage", ["garbage", "cut"])
def test_damaged_files_are_replaced(cached: PretrainedFeatureExtractor, what: str, damage: str) -> None:
    cached.transform(IMAGES)
    root = Path(cached.cache) / "v1"
    (folder,) = [root / "index"] if what == "index" else (root / "recipes").iterdir()
    cached_again = clone(cached).set_params(cache=str(root.parent.with_name("copy")))
    shutil.copytree(root.parent, cached_again.cache)
    file = Path(cached_again.cache) / folder.relative_to(root.parent) / "data.mdb"
    file.write_bytes(b"garbage" * 2000 if damage == "garbage" else file.read_bytes()[:8192])
    images = IMAGES if what == "recipe" else 255 - IMAGES  # a look-up of known arrays needs no index
    _is_right_with_one_warning(cached_again, images, "damaged")
    before = computed(cached_again)
    MEMORY.clear()
    cached_again.transform(images)
    assert computed(cached_again) == before


def test_wrong_bytes_in_a_record_are_never_served(cached: PretrainedFeatureExtractor) -> None:
    expected = cached.transform(IMAGES)
    copied = clone(cached).set_params(cache=cached.cache + "-copy")
    shutil.copytree(cached.cache, copied.cache)
    (folder,) = (Path(copied.cache) / "v1" / "recipes").iterdir()
    content = (folder / "data.mdb").read_bytes()
    needle = expected[3].tobytes()
    assert needle in content
    (folder / "data.mdb").write_bytes(content.replace(needle, needle[:-1] + bytes([needle[-1] ^ 1])))
    MEMORY.clear()
    store = FeatureStore(copied.cache)
    np.testing.assert_array_equal(copied.transform(IMAGES), expected)
    assert store.info()["computed"] == len(IMAGES) + 1
    assert store.verify()["wrong"] == 0  # it was written anew


def test_verify_deletes_wrong_records(cached: PretrainedFeatureExtractor) -> None:
    expected = cached.transform(IMAGES)
    copied = cached.cache + "-copy"
    shutil.copytree(cached.cache, copied)
    (folder,) = (Path(copied) / "v1" / "recipes").iterdir()
    content, needle = (folder / "data.mdb").read_bytes(), expected[3].tobytes()
    (folder / "data.mdb").write_bytes(content.replace(needle, bytes(len(needle))))
    assert FeatureStore(copied).verify() == {"records": len(IMAGES), "wrong": 1, "damaged": 0}
    assert FeatureStore(copied).verify() == {"records": len(IMAGES) - 1, "wrong": 0, "damaged": 0}


def test_folder_deleted_in_mid_run_costs_nothing_but_the_rows(cached: PretrainedFeatureExtractor) -> None:
    images = np.concatenate([IMAGES, 255 - IMAGES])
    expected = clone(PLAIN).transform(images)
    blocks = cached.set_params(batch_size=1).iter_transform(images)
    rows = [next(blocks)]
    shutil.rmtree(cached.cache)
    MEMORY.clear()
    with pytest.warns(StoreWarning, match="deleted"):
        rows += blocks
    assert relative_difference(np.concatenate(rows), expected) < 1e-5
    cached.transform(IMAGES)
    assert FeatureStore(cached.cache).verify() == {"records": len(IMAGES), "wrong": 0, "damaged": 0}


_FULL = """
    import resource, signal, sys, warnings
    import numpy as np
    from featx import FeatureStore, PretrainedFeatureExtractor

    warnings.simplefilter("always")
    folder, limit = sys.argv[1], int(sys.argv[2])
    X = np.random.default_rng(0).integers(0, 256, size=(600, 8, 8, 3), dtype=np.uint8)
    extractor = PretrainedFeatureExtractor("featx_micro", image_size=16, layers=0)
    expected = extractor.transform(X)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    extractor.set_params(cache=folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert np.linalg.norm(extractor.transform(X) - expected) < 1e-3
    assert len(caught) == 1, [str(warning.message) for warning in caught]
    assert "not kept" in str(caught[0].message), caught[0].message
    store = FeatureStore(folder)
    counts = store.verify()
    assert counts["records"] > 0 and not counts["wrong"] and not counts["damaged"], counts
"""


def test_full_quota_costs_one_warning_and_no_row(tmp_path: Path) -> None:
    run_python(_FULL, str(tmp_path / "store"), str(2 * 2**20))


def test_full_disk_costs_one_warning_and_no_row(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs the rights of root; the quota test covers the rest")
    try:
        run_python(_FULL, str(disk / "store"), "0")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_read_only_store_is_read_and_not_written(cached: PretrainedFeatureExtractor, tmp_path: Path) -> None:
    cached.transform(IMAGES[:10])
    (tmp_path / "extractor.pkl").write_bytes(pickle.dumps((clone(PLAIN), IMAGES[:12])))
    view = tmp_path / "view"
    view.mkdir()
    if subprocess.run(["mount", "--bind", "-o", "ro", cached.cache, view], capture_output=True).returncode:
        pytest.skip("mounting a folder read-only needs the rights of root")
    try:
        run_python(
            """
            import pickle, sys, warnings
            import numpy as np
            extractor, images = pickle.load(open(sys.argv[1], "rb"))
            expected = extractor.transform(images)
            extractor.set_params(cache=sys.argv[2])
            warnings.simplefilter("error")
            found = extractor.transform(images[:10])
            assert np.abs(found - expected[:10]).max() < 1e-4
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert np.abs(extractor.transform(images) - expected).max() < 1e-4
            assert len(caught) == 1 and "read-only" in str(caught[0].message).lower(), caught[0].message
            """,
            str(tmp_path / "extractor.pkl"),
            str(view),
        )
    finally:
        subprocess.run(["umount", "--lazy", view], check=True)
    assert computed(cached) == 10


def test_old_layouts_are_left_alone_and_cleared(cached: PretrainedFeatureExtractor) -> None:
    folder = Path(cached.cache)
    for name in ("v0/seed", "v0/rows.bin", "v2 photos/seed", "v3/mine.txt", "v4", "trash-mine/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of somebody")
    cached.transform(IMAGES)
    assert (folder / "v0" / "rows.bin").exists()
    FeatureStore(cached.cache).clear()
    assert sorted(path.name for path in folder.iterdir()) == ["trash-mine", "v2 photos", "v3", "v4"]
    cached.transform(IMAGES)
    assert computed(cached) == len(IMAGES)


# In company


def test_threads_share_the_work(tmp_path: Path) -> None:
    extractor = clone(PLAIN).set_params(cache=str(tmp_path), batch_size=2)
    expected, rows = clone(PLAIN).transform(IMAGES), {}

    def work(number: int) -> None:
        rows[number] = clone(extractor).transform(np.roll(IMAGES, 3 * number, axis=0))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, found in rows.items():
        assert relative_difference(found, np.roll(expected, 3 * number, axis=0)) < 1e-5
    assert computed(extractor) == len(IMAGES)


def _transform_in_child(extractor: PretrainedFeatureExtractor, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)  # torch's own threads do not survive a fork
    queue.put(extractor.transform(IMAGES[:10]))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_child_opens_the_store_anew(cached: PretrainedFeatureExtractor) -> None:
    expected = cached.transform(IMAGES[:10])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_transform_in_child, args=(cached, queue)) for _ in range(2)]
    for child in children:
        child.start()
    for _ in children:
        np.testing.assert_array_equal(queue.get(timeout=60), expected)
    for child in children:
        child.join()
    np.testing.assert_array_equal(cached.transform(IMAGES[:10]), expected)
    assert computed(cached) == 10


def test_paused_iterator_holds_nothing_up(cached: PretrainedFeatureExtractor) -> None:
    cached.set_params(batch_size=1)
    paused = cached.iter_transform(np.concatenate([IMAGES, 255 - IMAGES]))
    first = next(paused)
    rows = clone(cached).transform(np.concatenate([IMAGES, 255 - IMAGES]))
    np.testing.assert_array_equal(first, rows[:1])
    np.testing.assert_array_equal(np.concatenate([first, *paused]), rows)


_WORKER = """
    import sys, time
    import numpy as np
    from featx import PretrainedFeatureExtractor
    from featx.activations import extraction
    from featx.store.session import Session

    class Patience(Session):
        most = waits = 0  # in a row, without anything to compute

        def wait(self):
            Patience.waits += 1
            Patience.most = max(Patience.most, Patience.waits)
            super().wait()

        def put(self, *arguments):
            Patience.waits = 0
            super().put(*arguments)

    extraction.Session = Patience

    class Slow:
        cache_key = "slow"

        def __call__(self, image):
            import torch
            time.sleep(0.01)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    folder, seed = sys.argv[1], int(sys.argv[2])
    X = np.random.default_rng(0).integers(0, 256, size=(200, 32, 32, 3), dtype=np.uint8)
    mine = np.random.default_rng(seed).permutation(200)[:160]
    extractor = PretrainedFeatureExtractor("featx_micro", batch_size=8, n_jobs=1, cache=folder, preprocess=Slow())
    print("ready", flush=True)
    sys.stdin.readline()
    rows = extractor.transform(X[mine])
    np.savez(f"{folder}/of-{seed}.npz", mine=mine, rows=rows, waits=Patience.most)
"""


def test_clearing_beside_a_running_call_ends(cached: PretrainedFeatureExtractor) -> None:
    images = RNG.integers(0, 256, size=(150, 8, 8, 3), dtype=np.uint8)
    expected, found = clone(PLAIN).set_params(image_size=16).transform(images), []
    cached.set_params(image_size=16, batch_size=2)

    def work() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StoreWarning)
            found.extend(cached.transform(images) for _ in range(3))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    while worker.is_alive():
        FeatureStore(cached.cache).clear()
        FeatureStore(cached.cache).prune(0)
        worker.join(0.05)
    assert len(found) == 3
    for rows in found:
        assert relative_difference(rows, expected) < 1e-5


def test_others_finish_when_one_is_killed(tmp_path: Path) -> None:
    start = [sys.executable, "-c", textwrap.dedent(_WORKER), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([*start, str(seed)], **pipes) for seed in range(4)]
    for worker in workers:
        worker.stdout.readline()
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    store = FeatureStore(tmp_path)
    while store.info()["computed"] < 24:
        time.sleep(0.01)
    workers[0].kill()
    X = np.random.default_rng(0).integers(0, 256, size=(200, 32, 32, 3), dtype=np.uint8)

    def preprocess(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    expected = clone(PLAIN).set_params(preprocess=preprocess).transform(X)
    for seed, worker in enumerate(workers):
        _, errors = worker.communicate()
        if seed:
            assert worker.returncode == 0, errors
            with np.load(tmp_path / f"of-{seed}.npz") as found:
                assert relative_difference(found["rows"], expected[found["mine"]]) < 1e-4
                assert found["waits"] * session.POLL_S <= LEASE_S
    info = store.info()
    assert info["images"] <= 200
    assert info["computed"] <= info["images"] + 8
    assert store.verify()["wrong"] == 0


def test_killed_writers_leave_a_sound_store(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "stress_store.py"
    if not script.exists():
        pytest.skip("installed without the benchmarks")
    done = subprocess.run([sys.executable, str(script), "--rounds", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_store_is_cloned_pickled_and_shown(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, max_size="1GB", keep="asked")
    extractor = clone(PLAIN).set_params(cache=store)
    for copied in (clone(extractor), pickle.loads(pickle.dumps(extractor))):
        assert copied.cache == store
        assert "FeatureStore" in repr(copied)
    assert len(pickle.dumps(extractor)) < 2000
