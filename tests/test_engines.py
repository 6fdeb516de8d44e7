"""Two engines, one result: onnxruntime in torch's place, chosen by a table and never trusted unseen."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from children import in_child
from commands import runner
from conftest import SQUEEZENET, counting_images, relative_difference
from networks import InPlace
from PIL import Image
from releases import exports_graphs
from safetensors.torch import save_file
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from torchvision.models import resnet18

from featx import FeatureStore, FineTuneClassifier, PretrainedFeatureExtractor
from featx.activations import engine as loop
from featx.activations import passes
from featx.activations.exported import finding, graph, onnx_pass, sessions
from featx.backbones.networks import Network, NetworkSpec
from featx.cli.commands import featx
from featx.exceptions import EngineError, StoreWarning, WeightsError
from featx.store.files import Files

pytestmark = exports_graphs
X = np.random.default_rng(0).integers(0, 256, (11, 48, 40, 3), dtype=np.uint8)
Y = np.arange(len(X)) % 2
NEAR = 1e-5  # of a row's norm


def extractor(engine: str = "onnx", backbone: Any = "featx_micro", **params: Any) -> PretrainedFeatureExtractor:
    return PretrainedFeatureExtractor(backbone, engine=engine, **params)


@pytest.fixture
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(finding, "_HELD", finding._Held())


@pytest.fixture
def exports(nothing_known: None, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Columns of the graphs that are exported, export by export."""
    done: list[list[str]] = []
    export = finding.export

    def noting(network: Network, slots: Any, *more: Any) -> bytes:
        done.append([slot.column.name for slot in slots])
        return export(network, slots, *more)

    monkeypatch.setattr(finding, "export", noting)
    return done


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What computed, batch by batch."""
    used: list[str] = []
    choose = passes.Passes._pass

    def noting(self: passes.Passes, *given: Any) -> Any:
        chosen = choose(self, *given)
        used.append(type(chosen).__name__)
        return chosen

    monkeypatch.setattr(passes.Passes, "_pass", noting)
    return used


# The same rows.


@pytest.mark.parametrize(
    "params",
    [
        {"layers": "all"},
        {"layers": "penultimate"},
        {"layers": [0, "penultimate", -1], "pooling": "gem", "normalize": "l2"},
        {"layers": [0, -1], "pooling": "max", "grid": 2},
        {"layers": 1, "pooling": "flatten"},
        {"layers": -1, "pooling": "map"},
        {"layers": "features.0.conv"},
    ],
    ids=str,
)
def test_engines_agree(params: dict[str, Any]) -> None:
    wanted = extractor("torch", **params).transform(X)
    assert relative_difference(extractor("onnx", **params).transform(X), wanted) < NEAR


@pytest.mark.realdata
def test_engines_agree_on_photos_and_real_weights(ants_bees: Any) -> None:
    paths = ants_bees.data[:12]
    given = {"backbone": "squeezenet1_1", "weights": SQUEEZENET, "layers": [0, 1, 2, 3]}
    assert (
        relative_difference(extractor("onnx", **given).transform(paths), extractor("torch", **given).transform(paths))
        < NEAR
    )


def white_on_grey(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.resize((32, 32)), dtype=np.float32)).permute(2, 0, 1) / 100 - 1


@pytest.mark.parametrize("form", ["floats", "16 bits", "tensors", "callable", "some of each"])
def test_engines_agree_on_every_form_of_tile(form: str, tmp_path: Path) -> None:
    given: Any
    params: dict[str, Any] = {}
    if form == "floats":
        given = (X / 255).astype(np.float32)
    elif form == "16 bits":
        given = [str(tmp_path / f"{row}.png") for row in range(4)]
        for path, image in zip(given, X, strict=False):
            Image.fromarray(image[:, :, 0].astype(np.uint16) * 257).save(path)
    elif form == "tensors":
        given, params = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0)), {"preprocess": None}
    elif form == "callable":
        given, params = [Image.fromarray(image) for image in X], {"preprocess": white_on_grey}
    else:
        given = [X[0], str(tmp_path / "deep.png"), X[1]]
        Image.fromarray(X[2, :, :, 0].astype(np.uint16) * 257).save(given[1])
        given[0::2] = [Image.fromarray(image) for image in X[:2]]
    wanted = extractor("torch", **params).transform(given)
    assert relative_difference(extractor("onnx", **params).transform(given), wanted) < NEAR


@pytest.mark.parametrize("build", [None, resnet18])
def test_networks_that_write_over_outputs_agree(build: Callable[[], torch.nn.Module] | None) -> None:
    backbone = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(inplace=True), torch.nn.Conv2d(4, 4, 3), torch.nn.ReLU(inplace=True)
    )
    if build is not None:
        backbone = build()
    names = ["0", "2"] if build is None else ["layer1.0.bn2", "layer1", "bn1"]
    given = {"backbone": backbone, "layers": names, "image_size": 32}
    wanted = extractor("torch", **given).transform(X)
    assert relative_difference(extractor("onnx", **given).transform(X), wanted) < NEAR


def test_rows_do_not_depend_on_company_order_and_batches() -> None:
    whole = extractor(layers="all").transform(X)
    for batch_size in (1, 3, 9, 32):
        assert relative_difference(extractor(layers="all", batch_size=batch_size).transform(X), whole) < NEAR
    turned = extractor(layers="all").transform(X[::-1])[::-1]
    assert relative_difference(turned, whole) < NEAR
    alone = np.concatenate([extractor(layers="all").transform(X[row : row + 1]) for row in range(len(X))])
    assert relative_difference(alone, whole) < NEAR


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_named_engine_gives_the_same_bits(engine: str) -> None:
    first = extractor(engine, layers="all").transform(X)
    np.testing.assert_array_equal(extractor(engine, layers="all").transform(X), first)


def test_unreadable_and_not_finite_rows_are_told_as_ever(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    given = [X[0], str(tmp_path / "broken.jpg"), X[1]]
    given[0::2] = [Image.fromarray(image) for image in X[:2]]
    with pytest.warns(UserWarning, match="1 of 3"):
        rows = extractor(on_error="nan").transform(given)
    assert np.isnan(rows).all(1).tolist() == [False, True, False]
    huge = torch.full((2, 3, 32, 32), 3e38)
    errors = []
    for engine in ("torch", "onnx"):
        with pytest.raises(ValueError, match="Finite features are expected") as caught:
            extractor(engine, preprocess=None).transform(huge)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


# Which engine.


REFUSALS: dict[str, dict[str, Any]] = {
    "precision": {"precision": "bfloat16"},
    "outside of torch": {"backbone": InPlace(), "image_size": 32},
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_engine_that_cannot_be_had_is_one_error_with_its_reason(reason: str, nothing_known: None) -> None:
    with pytest.raises(EngineError, match=f'engine="onnx".*{reason}.*engine="torch"'):
        extractor("onnx", **REFUSALS[reason]).transform(X)
    extractor("auto", **REFUSALS[reason]).transform(X)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, nothing_known: None) -> None:
    for name in ("onnxruntime", "onnxscript"):
        with monkeypatch.context() as patched:
            patched.setattr(finding, "is_installed", lambda asked, name=name: asked != name)
            with pytest.raises(EngineError, match=rf"{name} is not installed, which pip install featx\[onnx\] brings"):
                extractor().transform(X)
            assert len(extractor("auto").transform(X)) == len(X)


def test_old_torch_is_named(monkeypatch: pytest.MonkeyPatch, nothing_known: None) -> None:
    monkeypatch.setattr(finding, "exports_graphs", lambda: False)
    with pytest.raises(EngineError, match=r"torch 2\.9"):
        extractor().transform(X)


def test_wrong_engine_is_told_as_scikit_learn_does() -> None:
    with pytest.raises(ValueError, match="The 'engine' parameter of PretrainedFeatureExtractor must be"):
        extractor("tensorrt").transform(X)


def test_fit_tells_of_an_engine_that_cannot_be_had() -> None:
    with pytest.raises(EngineError, match="precision"):
        extractor(precision="float16").fit(X)


def test_auto_takes_torch_for_few_images(engines: list[str], exports: list[list[str]]) -> None:
    extractor("auto").transform(X)
    assert {*engines} == {"TorchPass"}
    assert exports == []


def test_auto_asks_with_the_number_of_images_still_to_be_computed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nothing_known: None
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(passes, "pays", lambda architecture, slots, n, threads: bool(asked.append(n)))
    model = extractor("auto", cache=str(tmp_path))
    model.transform(X[:4])
    model.transform(X)
    model.transform(X)
    extractor("auto").transform(X)
    assert asked == [4, 7, 11]


def test_auto_takes_a_graph_that_is_there(engines: list[str], exports: list[list[str]]) -> None:
    extractor("onnx").transform(X)
    engines.clear()
    extractor("auto", layers=-1).transform(X[:1])
    assert {*engines} == {"OnnxPass"}
    assert len(exports) == 1


def test_one_export_serves_all_layers(exports: list[list[str]]) -> None:
    for layers in ("penultimate", 0, -1, "all", [1, "penultimate"]):
        for pooling in ("avg", "max", "gem"):
            extractor(layers=layers, pooling=pooling).transform(X[:2])
    assert len(exports) == 1


def test_large_values_are_graphs_of_their_own(exports: list[list[str]]) -> None:
    extractor(layers=1, pooling="flatten").transform(X[:2])
    assert [len(columns) for columns in exports] == [1]


def test_reason_for_torch_is_told_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, nothing_known: None
) -> None:
    monkeypatch.setattr(finding, "is_installed", lambda _: False)
    monkeypatch.setattr(loop, "_TOLD", set())
    extractor("auto").transform(X[:2])
    assert "onnxruntime" not in capsys.readouterr().err
    for _ in range(2):
        extractor("auto", verbose=1).transform(X[:2])
    assert capsys.readouterr().err.count("onnxruntime is not installed") == 1


# What is compared before it is used.


def farther(graph: graph.Graph, found: Any) -> tuple[float, str]:
    return 2e-5, graph.outputs[0]


def test_graph_that_does_not_agree_is_not_used(
    monkeypatch: pytest.MonkeyPatch, exports: list[list[str]], engines: list[str]
) -> None:
    monkeypatch.setattr(graph.Graph, "farthest", farther)
    for _ in range(2):  # nor exported again
        with pytest.raises(EngineError, match="differ from torch's by 2e-05 of their norm"):
            extractor().transform(X)
    extractor("auto").transform(X)
    assert engines[-1] == "TorchPass"
    assert len(exports) == 1


def test_network_with_values_that_are_not_finite_is_left_to_torch(nothing_known: None) -> None:
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Conv2d(2, 2, 3))
    with torch.no_grad():
        backbone[1].weight[0] = float("nan")
    with pytest.raises(EngineError, match="differ from torch's by inf"):
        extractor(backbone=backbone, layers="0", image_size=32).transform(X)


def test_distance_is_that_of_the_worst_row() -> None:
    wanted = {"a": np.ones((8, 4), np.float32), "b": np.zeros((8, 2), np.float32)}
    there = graph.Graph(b"", ("a", "b"), frozenset(), np.zeros((8, 1)), wanted)
    found = [wanted["a"].copy(), wanted["b"].copy()]
    assert there.farthest(found)[0] == 0
    found[0][3, 1] += 0.5
    assert there.farthest(found) == (pytest.approx(0.25), "a")
    found[1][2, 0] = 1e-9
    assert there.farthest(found) == (np.inf, "b")
    found[1][2, 0] = np.nan
    assert there.farthest(found) == (np.inf, "b")


@pytest.mark.parametrize(
    "error", [ImportError("libonnxruntime.so"), RuntimeError("[ONNXRuntimeError] : 9"), MemoryError()]
)
def test_onnxruntime_that_fails_leaves_auto_to_torch(
    error: Exception, monkeypatch: pytest.MonkeyPatch, exports: list[list[str]]
) -> None:
    def failing(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(finding, "run", failing)
    monkeypatch.setattr(passes, "pays", lambda *_: True)
    wanted = extractor("torch").transform(X)
    np.testing.assert_array_equal(extractor("auto").transform(X), wanted)
    with pytest.raises(EngineError, match="onnxruntime cannot run it here"):
        extractor("onnx").transform(X)


def test_layer_that_is_refused_refuses_no_other(exports: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    extractor(layers=0).transform(X[:2])
    with monkeypatch.context() as patched:
        patched.setattr(graph.Graph, "farthest", farther)
        with pytest.raises(EngineError, match="differ"):
            extractor(layers="features.0.conv").transform(X[:2])
    extractor(layers=1).transform(X[:2])
    with pytest.raises(EngineError, match="differ"):
        extractor(layers="features.0.conv").transform(X[:2])


def test_hooks_of_another_threads_pass_are_waited_for(nothing_known: None) -> None:
    network = extractor()._spec().load("cpu", torch.float32)
    with network.lock, ThreadPoolExecutor(1) as pool:
        handle = network.module.register_forward_hook(lambda *_: None)
        asked = pool.submit(finding.why_no_export, network)
        threading.Event().wait(0.2)
        handle.remove()
        network.lock.release()
        try:
            assert asked.result(timeout=60) is None
        finally:
            network.lock.acquire()


def test_weights_that_change_before_an_export_leave_no_graph(tmp_path: Path, exports: list[list[str]]) -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        network = extractor(weights=None, random_state=seed)._spec().load("cpu", torch.float32)
        return {name: value.contiguous() for name, value in network.module.state_dict().items()}

    first, second = state(1), state(2)
    file = tmp_path / "weights.safetensors"
    save_file(first, file)
    model = extractor("torch", weights=str(file), cache=str(tmp_path / "store"))
    model.transform(X[:2])  # the store knows what the file holds
    load = NetworkSpec.load

    def changing(self: NetworkSpec, *given: Any) -> Network:
        save_file(second, file)
        return load(self, *given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(NetworkSpec, "load", changing)
        with pytest.raises(WeightsError, match="changed"):
            model.set_params(engine="onnx").transform(X[2:])
    assert exports == []
    assert kept_files(tmp_path / "store") == []


# Kept in a store.


SECOND = """
import sys, numpy as np
from featx import PretrainedFeatureExtractor
from featx.activations.exported import finding
def refuse(*_): raise AssertionError("exported again")
finding.export = refuse
X = np.load(sys.argv[1])
rows = PretrainedFeatureExtractor("featx_micro", layers="all", engine=sys.argv[3], cache=sys.argv[2]).transform(X)
from featx.backbones.networks import _SHELF
np.save(sys.argv[4], rows)
print(len(_SHELF._networks), "onnxruntime" in sys.modules)
"""


def in_new_process(images: np.ndarray, store: Path, engine: str, folder: Path) -> tuple[np.ndarray, list[str]]:
    np.save(folder / "images.npy", images)
    command = [sys.executable, "-c", SECOND, folder / "images.npy", store, engine, folder / "rows.npy"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return np.load(folder / "rows.npy"), said.split()


def test_second_process_finds_the_graph_and_loads_no_network(tmp_path: Path, nothing_known: None) -> None:
    store = tmp_path / "store"
    extractor(layers="all", cache=str(store)).transform(X[:6])
    rows, said = in_new_process(X[6:], store, "auto", tmp_path)
    assert said == ["0", "True"]
    assert relative_difference(rows, extractor("torch", layers="all").transform(X[6:])) < NEAR


def kept_files(store: Path) -> list[Path]:
    return sorted(store.glob("v*/files/*"))


def kept_graph(store: Path) -> Path:
    return max(kept_files(store), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", ["cut", "blank", "other", "gone"])
def test_damaged_graph_is_made_again(
    tmp_path: Path, exports: list[list[str]], damage: str, nothing_known: None
) -> None:
    model = extractor(cache=str(tmp_path))
    wanted = model.transform(X[:4])
    file = kept_graph(tmp_path)
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        half = len(content) // 2
        file.write_bytes(
            {"cut": content[:half], "blank": bytes(len(content)), "other": content[:half] + b"?" * half}[damage]
        )
    finding._HELD = finding._Held()
    rows = model.transform(X)
    assert len(exports) == 2
    assert relative_difference(rows[:4], wanted) < NEAR
    assert kept_graph(tmp_path).stat().st_size > len(content) / 2


def test_other_versions_do_not_share_graphs(
    tmp_path: Path, exports: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = extractor(cache=str(tmp_path))
    model.transform(X[:4])
    finding._HELD = finding._Held()
    installed = finding.installed
    monkeypatch.setattr(
        finding, "installed", lambda name: f"{installed(name)}.post1" if name == "onnx" else installed(name)
    )
    model.transform(X)
    assert len(exports) == 2
    assert len(kept_files(tmp_path)) == 4  # and both can be used beside one another


def test_kept_graph_is_compared_again_on_another_processor(
    tmp_path: Path, exports: list[list[str]], monkeypatch: pytest.MonkeyPatch, engines: list[str]
) -> None:
    model = extractor(cache=str(tmp_path))
    model.transform(X[:2])
    compared: list[str] = []
    farthest = graph.Graph.farthest

    def noting(self: graph.Graph, found: Any) -> tuple[float, str]:
        compared.append(self.key)
        return farthest(self, found)

    monkeypatch.setattr(graph.Graph, "farthest", noting)
    for n, (machine, times) in enumerate([("here", 0), ("elsewhere", 1), ("elsewhere", 1)], 3):
        if machine == "elsewhere":
            monkeypatch.setattr(finding, "processor", lambda: "another")
        finding._HELD = finding._Held()
        model.transform(X[:n])
        assert len(compared) == times
    monkeypatch.setattr(finding, "processor", lambda: "a third")
    monkeypatch.setattr(graph.Graph, "farthest", farther)
    finding._HELD = finding._Held()
    engines.clear()
    extractor("auto", cache=str(tmp_path)).transform(X)
    assert {*engines} == {"TorchPass"}
    assert len(exports) == 1


def test_failed_export_is_remembered_in_the_store(
    tmp_path: Path, exports: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph.Graph, "farthest", farther)
    for _ in range(2):
        finding._HELD = finding._Held()
        with pytest.raises(EngineError, match="differ from torch's"):
            extractor(cache=str(tmp_path)).transform(X)
    assert len(exports) == 1


def test_graphs_are_counted_pruned_verified_and_cleared(tmp_path: Path, nothing_known: None) -> None:
    store = FeatureStore(str(tmp_path))
    extractor(cache=store).transform(X)
    info = store.info()
    assert info["graphs"] == len(kept_files(tmp_path)) == 2
    assert info["file_bytes"] >= sum(path.stat().st_size for path in kept_files(tmp_path))
    records = store.verify()["records"]
    kept_graph(tmp_path).write_bytes(b"nonsense that is longer than a digest")
    assert store.verify() == {"records": records, "wrong": 1, "damaged": 0}
    rows = info["live_bytes"]
    store.prune(store.info()["file_bytes"] - 1)
    assert store.info()["graphs"] == 0
    assert store.info()["live_bytes"] == rows  # the graphs went first
    store.clear()
    assert kept_files(tmp_path) == []


def test_graph_that_leaves_no_room_is_not_kept_and_that_is_told(tmp_path: Path, nothing_known: None) -> None:
    store = FeatureStore(str(tmp_path), max_size="1MB")
    with pytest.warns(StoreWarning, match="An exported network is not kept .* max_size='1MB'"):
        rows = extractor(cache=store).transform(X)
    assert kept_graph(tmp_path).stat().st_size < 100
    np.testing.assert_array_equal(extractor(cache=store).transform(X), rows)


def test_onnxruntime_is_loaded_without_what_opens_connections() -> None:
    code = """
import os
from featx.activations.exported.sessions import _runtime
before = len(os.listdir("/proc/self/task"))
_runtime()
print(len(os.listdir("/proc/self/task")) - before, "ORT_DISABLE_TELEMETRY" in os.environ)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["0", "False"], done.stderr


def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store").mkdir()
    files = Files(tmp_path / "store" / "files")
    files.write("name", b"first")
    write = Path.write_bytes

    def half(self: Path, content: bytes) -> int:
        write(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        files.write("name", b"second")
    assert files.read("name") == b"first"
    assert [path.name for path in files.folder.iterdir()] == ["name"]


KILLED = """
import sys
from pathlib import Path
from featx.store.files import Files
files = Files(Path(sys.argv[1]))
content = [bytes([i]) * 3_000_000 for i in range(2)]
print("begun", flush=True)
i = 0
while True:
    files.write("name", content[i % 2])
    i += 1
"""


def test_killed_writers_leave_whole_files(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for delay in (0.01, 0.03, 0.05):
        writers = [subprocess.Popen([sys.executable, "-c", KILLED, folder], stdout=subprocess.PIPE) for _ in range(2)]
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        threading.Event().wait(delay)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        found = Files(folder).read("name")
        assert found in (bytes(3_000_000), b"\1" * 3_000_000)


# What is left alone.


def test_export_leaves_global_state_alone(nothing_known: None) -> None:
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)

    def state() -> Any:
        return (
            random.getstate(),
            pickle.dumps(np.random.get_state()),  # noqa: NPY002
            torch.random.get_rng_state().tolist(),
            torch.get_num_threads(),
            torch.backends.mkldnn.enabled,
            torch.is_grad_enabled(),
            [*warnings.filters],
            os.sched_getaffinity(0),
        )

    before = state()
    extractor(layers="all").transform(X)
    assert state() == before


def test_users_module_is_left_as_it_was(nothing_known: None) -> None:
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 3)).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    extractor(backbone=backbone, layers="2", image_size=32).transform(X)
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())


def test_export_prints_and_warns_nothing(nothing_known: None, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extractor().transform(X)
    assert capfd.readouterr() == ("", "")


def test_threads_that_transform_at_once_export_once_and_agree(exports: list[list[str]]) -> None:
    wanted = extractor("torch", layers="all").transform(X)
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda _: extractor(layers="all").transform(X), range(4))]
    assert max(relative_difference(rows, wanted) for rows in found) < NEAR
    assert len(exports) == 1


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_as_many_threads_work_as_torch_would_take(n_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    worked: list[tuple[int, int]] = []
    together = threading.Barrier(n_threads, timeout=60)
    running = onnx_pass.run

    def noting(graph: Any, tiles: np.ndarray, names: Any, n: int) -> Any:
        worked.append((threading.get_ident(), n))
        if len(worked) <= n_threads:
            together.wait()  # all are at work at once
        return running(graph, tiles, names, n)

    extractor().transform(X[:2])
    monkeypatch.setattr(onnx_pass, "run", noting)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(n_threads)
        extractor().transform(np.tile(X, (8, 1, 1, 1))[:32])
        assert torch.get_num_threads() == n_threads
        assert len({thread for thread, _ in worked}) == n_threads
        assert {n for _, n in worked} == {1}
        worked[:] = [(0, 0)] * n_threads
        extractor().transform(X[:1])
        assert worked[-1][1] == n_threads  # which share a lone image
    finally:
        torch.set_num_threads(before)


# Forks and workers.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_children_open_sessions_of_their_own() -> None:
    model = extractor(layers="all")
    wanted = model.transform(X)
    for _ in range(5):
        rows, threads = in_child(lambda: (model.transform(X), [key[2] for key in sessions._SESSIONS]))
        assert relative_difference(rows, wanted) < NEAR
        assert threads == [1]
    np.testing.assert_array_equal(model.transform(X), wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_child_that_ends_as_an_interpreter_does_frees_nothing_of_the_parents() -> None:
    code = """
import os, sys, warnings
import numpy as np
warnings.simplefilter("ignore")
from featx import PretrainedFeatureExtractor
model = PretrainedFeatureExtractor("featx_micro", engine="onnx")
X = np.zeros((3, 40, 40, 3), np.uint8)
model.transform(X)
for _ in range(3):
    pid = os.fork()
    if not pid:
        model.transform(X)
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0
model.transform(X)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr


def test_grid_search_in_workers_gives_the_same_scores(tmp_path: Path) -> None:
    scores = []
    for engine in ("torch", "onnx"):
        model = make_pipeline(extractor(engine, cache=str(tmp_path / engine)), LogisticRegression(max_iter=1000))
        grid = {"pretrainedfeatureextractor__layers": [0, -1]}
        search = GridSearchCV(model, grid, cv=2, n_jobs=2, error_score="raise").fit(X, Y)
        scores.append(search.cv_results_["mean_test_score"])
    np.testing.assert_allclose(scores[0], scores[1])


@pytest.mark.parametrize("first", ["torch", "onnx"])
def test_command_extracts_with_the_engine_of_its_first_run(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engines: list[str], nothing_known: None
) -> None:
    (tmp_path / "photos").mkdir()
    for row, image in enumerate(X):
        Image.fromarray(image).save(tmp_path / "photos" / f"{row}.png")
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path / "cache"))
    words = [str(tmp_path / "photos"), "-o", str(tmp_path / "f.npy"), "--backbone", "featx_micro"]
    monkeypatch.setattr(passes, "pays", lambda *_: first == "onnx")
    assert runner().invoke(featx, ["extract", *words]).exit_code == 0
    Image.fromarray(255 - X[0]).save(tmp_path / "photos" / "new.png")
    engines.clear()
    monkeypatch.setattr(finding, "_HELD", finding._Held())
    monkeypatch.setattr(passes, "pays", lambda *_: first != "onnx")
    assert runner().invoke(featx, ["extract", *words]).exit_code == 0
    assert {*engines} == {"OnnxPass" if first == "onnx" else "TorchPass"}


# Fine-tuning.


def classifier(**params: Any) -> FineTuneClassifier:
    return FineTuneClassifier("featx_micro", freeze=-1, epochs=2, **params)


def test_fit_with_a_seed_takes_torch(engines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "pays", lambda *_: True)
    classifier(random_state=0).fit(X, Y)
    assert {*engines} == {"TorchPass"}
    engines.clear()
    classifier(random_state=None).fit(X, Y)
    assert {*engines} == {"OnnxPass"}
    engines.clear()
    classifier(random_state=0, engine="onnx").fit(X, Y)
    assert {*engines} == {"OnnxPass"}


@pytest.mark.parametrize("engine", ["auto", "torch", "onnx"])
def test_same_seed_gives_the_same_bits(engine: str) -> None:
    first, second = (classifier(random_state=0, engine=engine).fit(X, Y) for _ in range(2))
    for name, value in first.tensors_.items():
        assert torch.equal(value, second.tensors_[name])


def test_tuned_networks_agree_between_engines() -> None:
    probabilities = [
        classifier(random_state=0, engine=engine).fit(X, Y).predict_proba(X) for engine in ("torch", "onnx")
    ]
    np.testing.assert_allclose(probabilities[0], probabilities[1], atol=1e-4)


def test_engine_is_a_parameter_like_others(tmp_path: Path) -> None:
    model = classifier(random_state=0, engine="onnx").fit(X, Y)
    assert clone(model).engine == "onnx"
    model.save(tmp_path / "model.safetensors")
    assert FineTuneClassifier.load(tmp_path / "model.safetensors").engine == "auto"  # of the machine that loads


def test_images_are_counted_once_whatever_the_engine(tmp_path: Path) -> None:
    with counting_images("FeatxMicro") as batches:
        before = loop.TALLY.n_images
        model = extractor(cache=str(tmp_path))
        for layers in (0, 1, "penultimate"):
            model.set_params(layers=layers).transform(X)
    assert loop.TALLY.n_images - before == len(X)
    assert sum(batches) <= 8 + 2  # torch saw what the graph was compared with, where it was exported here
