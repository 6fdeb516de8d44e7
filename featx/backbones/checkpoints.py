"""From a file of weights, whatever its name, to tensors by their place in it; nothing in it is imported or executed."""

from __future__ import annotations

import _compat_pickle
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from textwrap import shorten
from typing import IO, Any

import torch
from torch.serialization import safe_globals

from featx.exceptions import WeightsError

#: To be raised whenever the same file would be read otherwise.
READER = 1

_HEAD_BYTES = 512
_DEEPEST = 12  # containers within containers
_LONGEST_KEY = 40  # characters that a message shows
_LONGEST_HEADER = 100_000_000  # bytes of JSON, behind their number, that a safetensors file begins with
_ZIP = b"PK\x03\x04"
_TORCH_PICKLE = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch.save began with before it wrote archives
_PICKLES_IN_FRONT = 4  # of the tensors of such a file: the number, a protocol, about the machine, the content
# Beginnings of what torch and safetensors do not write: what it is, and what to do.
_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, which only stands for the file",
        "Run git lfs pull where it lies.",
    ),
    (b"\x89HDF", "an HDF5 file, as Keras writes", "Take the network's weights for PyTorch."),
    (b"\x93NUMPY", "a NumPy array", "Take the network's weights for PyTorch."),
    (b"GGUF", "a GGUF file", "Take the network's weights for PyTorch."),
    (b"\x1f\x8b", "compressed (gzip)", "Unpack it, and pass the file inside."),
    (b"BZh", "compressed (bzip2)", "Unpack it, and pass the file inside."),
    (b"\xfd7zXZ", "compressed (xz)", "Unpack it, and pass the file inside."),
    (b"(\xb5/\xfd", "compressed (zstd)", "Unpack it, and pass the file inside."),
    (b"<", "a web page (HTML or XML)", "Download the file itself, not the page about it."),
    (b"{", "a text file (JSON)", "Pass the file of tensors that lies beside it."),
)
# What pickles of containers and tensors name besides; the rest is what a file holds beside tensors.
_ORDINARY = ("torch.", "collections.", "builtins.", "copyreg.", "_codecs.", "numpy.")


def read_checkpoint(path: str) -> dict[str, torch.Tensor]:
    """All tensors of a file, on the CPU.

    The content decides how the file is read: safetensors, or what ``torch.save`` writes or wrote. Objects of foreign
    classes beside the tensors (settings, callbacks) are passed over: their classes are not imported, and an empty shell
    stands for each. Names that torch puts before those of a module's parameters where it compiles, shards or
    checkpoints it are left out.

    Parameters
    ----------
    path : str

    Returns
    -------
    tensors : dict of str to tensor
        By the keys of the containers around them, with dots between: ``"state_dict.conv1.weight"``.

    Raises
    ------
    WeightsError
        It holds no tensors that can be read; the message says what it is and what to do.
    """
    try:
        tree = _read(path)
    except OSError as error:
        raise _unreadable(
            path, f"cannot be opened ({error.strerror})", "Check the path and its permissions."
        ) from error
    found: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors_in(tree):
        if name in found and not same(found[name], tensor):
            raise _unreadable(path, f"holds two tensors {name!r}", "Rename a key of the containers around them.")
        found[name] = tensor
    if not found:
        raise _without_tensors(path, tree)
    return found


def is_written_by_torch(path: str) -> bool:
    """Whether a file is one that ``torch.save`` writes, or wrote, by its first bytes."""
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    return head.startswith(_ZIP) or _TORCH_PICKLE in head


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal to the bit, not-a-numbers included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    alike = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return alike or torch.equal(_bits(one), _bits(other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class _Shell:
    """What stands for an object of a class that is not imported.

    Attributes
    ----------
    made_from : tuple
        Arguments that the object was to be made from.
    state : object
        What it was to be set to.
    """

    full_name = ""

    def __new__(cls, *args: Any) -> _Shell:
        shell = super().__new__(cls)
        shell.made_from, shell.state = args, None
        return shell

    def __init__(self, *args: Any) -> None:
        self.made_from: tuple[Any, ...]
        self.state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @property
    def is_network(self) -> bool:
        """Whether it was a torch.nn.Module."""
        return isinstance(self.state, dict) and {"_modules", "_parameters"} <= self.state.keys()

    @property
    def class_name(self) -> str:
        """The class that it was of, in full."""
        kinds = [kind for kind in self.made_from[:1] if isinstance(kind, type) and issubclass(kind, _Shell)]
        return kinds[0].full_name if self.full_name == "copyreg._reconstructor" and kinds else self.full_name


def _read(path: str) -> Any:
    """What a file holds, as containers of tensors and shells."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    if not size:
        raise _unreadable(path, "is empty (0 bytes)", "Fetch or save it again.")
    if head.startswith(_ZIP):
        _check_archive(path)
        return _read_torch(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER:
        return _read_safetensors(path)
    if _TORCH_PICKLE in head:
        return _read_torch(path)
    raise _unreadable(path, *_what_else(head))


def _what_else(head: bytes) -> tuple[str, str]:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for beginning, what, mend in _OTHERS:
        if text.startswith(beginning) or head.startswith(beginning):
            return f"is {what}", mend
    if head[257:262] == b"ustar":
        return "is a tar archive", "Unpack it, and pass the file inside."
    if head.startswith(b"\x80"):
        mend = "Load it where you trust it, and write its tensors with torch.save."
        return "is a pickle that torch.save did not write", mend
    return f"is in no format that torch or safetensors writes (it begins with {head[:8]!r})", _SAVE_AGAIN


_SAVE_AGAIN = "Write it with torch.save(model.state_dict(), PATH)."


def _check_archive(path: str) -> None:
    """Raise where a zip file is none that ``torch.save`` wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise _unreadable(path, "is an archive that was cut short", "Fetch or save it again.") from error
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        mend = f'Save its tensors: torch.save(torch.jit.load({path!r}).state_dict(), "weights.pth").'
        raise _unreadable(path, "is a TorchScript archive", f"{mend} Do it only where you trust the file.")
    if any(name.endswith(".npy") for name in names):
        raise _unreadable(path, "is a NumPy archive", "Take the network's weights for PyTorch.")
    if "data.pkl" not in inside:
        raise _unreadable(path, "is a zip archive of other files", "Unpack it, and pass the file inside.")


def _read_safetensors(path: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        what = "is a safetensors file that is damaged or was cut short"
        raise _unreadable(path, what, "Fetch or save it again.") from error


def _read_torch(path: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about what it cannot read: the error says it shorter
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                with safe_globals(_shells(_names_in(path))):  # type: ignore[arg-type]
                    return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _with_more_than_tensors(path) from error
    except OSError:
        raise
    except Exception as error:  # archive, pickle and torch each have errors of their own
        what = "is a file of torch.save's that is damaged or was cut short"
        raise _unreadable(path, what, "Fetch or save it again.") from error


# Python's containers that torch would not fill, and plain ones that it does.
_CONTAINERS: dict[str, Callable[..., Any]] = {
    "collections.defaultdict": lambda *_: OrderedDict(),
    "collections.deque": lambda *_: [],
}


def _shells(names: Sequence[str]) -> list[tuple[Callable[..., Any], str]]:
    """What torch takes in place of the functions and classes of some names; its own it takes all the same."""
    return [(_CONTAINERS.get(name) or type("_ShellOfOne", (_Shell,), {"full_name": name}), name) for name in names]


def _names_in(path: str) -> list[str]:
    """Functions and classes that a file of ``torch.save``'s names, as Python 3 calls them."""
    names: dict[str, None] = {}
    for module, name in _globals_in(path):
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        names[f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"] = None
    return list(names)


def _globals_in(path: str) -> Iterator[tuple[str, str]]:
    def read(stream: IO[bytes]) -> Iterator[tuple[str, str]]:
        for operation, argument, _ in pickletools.genops(stream):
            if operation.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                yield module, name

    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            for _ in range(_PICKLES_IN_FRONT):
                yield from read(file)
        return
    with zipfile.ZipFile(path) as archive:
        (member,) = (name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
        with archive.open(member) as stream:
            yield from read(stream)


# Torch's own names for a module that it wraps in place, in the middle of the names of parameters.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def _tensors_in(tree: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        if tree.layout == torch.strided and not (tree.is_quantized or tree.is_meta):
            yield _WRAPPERS.sub("", ".".join(filter(None, place))), tree.detach()
    elif len(place) < _DEEPEST:
        for key, value in _children(tree):
            yield from _tensors_in(value, (*place, key))


def _children(tree: Any) -> list[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        return [(str(key), value) for key, value in tree.items() if isinstance(key, (str, int))]
    return [(str(i), value) for i, value in enumerate(tree)] if isinstance(tree, (list, tuple)) else []


def _networks_in(tree: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], _Shell]]:
    """Pickled networks of a file, and where they are."""
    if isinstance(tree, _Shell) and tree.is_network:
        yield place, tree
    elif len(place) < _DEEPEST:
        for key, value in _children(tree):
            yield from _networks_in(value, (*place, key))


def _without_tensors(path: str, tree: Any) -> WeightsError:
    for place, network in _networks_in(tree):
        keys = "".join(f"[{key!r}]" for key in place)
        return _unreadable(
            path,
            f"holds a whole network, pickled with the name of its class, {network.class_name}, which is not imported",
            "Where you trust the file, save its tensors: "
            f'torch.save(torch.load({path!r}, weights_only=False){keys}.state_dict(), "weights.pth").',
        )
    return _unreadable(path, f"holds no named tensors but {_kind_of(tree)}", _SAVE_AGAIN)


def _kind_of(tree: Any) -> str:
    """What something is, in a few words whatever it holds."""
    kind = tree.class_name if isinstance(tree, _Shell) else type(tree).__name__
    keys = [*tree] if isinstance(tree, Mapping) else [key for key, _ in _children(tree)]
    told = (shorten(str(key) if isinstance(key, (str, int)) else repr(key), _LONGEST_KEY) for key in keys[:5])
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}" + (f" of {', '.join(told)}" if keys else "")


def _with_more_than_tensors(path: str) -> WeightsError:
    try:
        names = [name for name in _names_in(path) if not name.startswith(_ORDINARY)]
    except Exception:  # pickletools raises what a damaged stream makes it raise
        names = []
    listed = f" ({', '.join(names[:3])})" if names else ""
    what = f"holds other things than tensors{listed}, which cannot be read without executing what the file says"
    load = f"torch.load({path!r}, weights_only=False)"
    if not names or not zipfile.is_zipfile(path):  # written in an older way, of which torch's careful reader knows less
        mend = f'write it anew: torch.save({load}, "weights.pth")'
    else:
        plain = '("dict", "OrderedDict", "Tensor")'
        kept = f"{{key: value for key, value in {load}.items() if type(value).__name__ in {plain}}}"
        mend = f'save its tensors alone: torch.save({kept}, "weights.pth")'
    return _unreadable(path, what, f"Where you trust the file, {mend}.")


def _unreadable(path: str, what: str, mend: str) -> WeightsError:
    return WeightsError(f"A file of tensors is expected, got weights={path!r}, which {what}. {mend}")
