"""Reading files of weights that may be damaged, or made to do harm: every byte is checked first."""

import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

# A tensor may be in a file under several names (GPT-2's embedding is its head), but not under any number.
_NAMES_OF_A_TENSOR = 8


class Unreadable(Exception):
    """One line: what is wrong with a file of weights."""


def read_torch_file(path: Path, *, mmap: bool = False) -> object:
    """Read what ``torch.save`` wrote, without running pickled code, after comparing its checksums.

    torch itself compares none: a changed byte would be another weight. Files of torch before 1.6 have none;
    they are read as they are. ``mmap``: tensors are read from disk as they are asked for. Raises
    ``Unreadable`` with one line for a file that is damaged, of another program, or holds more than tensors
    and plain values.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _compare_checksums(path)
        elif tarfile.is_tarfile(path):
            raise Unreadable("a tar file, as torch wrote them before version 0.1.10")
        with warnings.catch_warnings():
            # torch asks to report the pickle protocol of a file that it is then right to refuse.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            warnings.filterwarnings(
                "ignore", "'torch.load' received a zip file that looks like a TorchScript"
            )
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    except Unreadable:
        raise
    except (pickle.UnpicklingError, LookupError) as error:
        # torch's own text advises to execute what is in the file; what is missing in it tells a user nothing.
        raise Unreadable(
            "it is damaged, of another program, or holds more than weights: pickled objects are not loaded, "
            "because that can run code"
        ) from error
    # What a damaged or foreign file raises depends on where its reader happens to stumble over it, and what
    # torch says of it is about its own insides.
    except OSError as error:
        raise Unreadable(error.strerror or "it can't be read") from error
    except Exception as error:
        raise Unreadable("it is damaged or cut short, or of another program") from error


def check_tensors(state: Mapping[str, object], size: int) -> None:
    """Raise ``Unreadable`` where a weight is no plain tensor of the file's own numbers; names the tensor.

    ``size``: of the file in bytes. A few bytes can stand for a tensor of any size (one number, repeated).
    """
    room = _NAMES_OF_A_TENSOR * size
    for name, tensor in state.items():
        if not isinstance(name, str) or type(tensor) not in (Tensor, nn.Parameter):
            raise Unreadable(f"{name!r} is no tensor")
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        bytes_of = tensor.numel() * tensor.element_size()
        if not plain or bytes_of > tensor.untyped_storage().nbytes():
            raise Unreadable(f"the tensor {name} is not a plain one with all its numbers in the file")
        room -= bytes_of
        if room < 0:
            raise Unreadable("its tensors are larger than the file")


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Raise ``Unreadable`` naming the first tensor that holds a number which is not finite."""
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.sum(dtype=torch.float32).isfinite():
            continue  # one number that is not finite makes the sum so, which takes a fifth of the time
        if not tensor.isfinite().all():
            raise Unreadable(f"the weights {name} hold numbers that are not finite (NaN or infinite)")


def check_sizes(wanted: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> None:
    """Raise ``Unreadable`` where a description and the weights are not of the same model."""
    for name, tensor in wanted.items():
        if name not in there:
            raise Unreadable(f"it lacks the weights {name} that its description asks for")
        if tensor.shape != there[name].shape:
            raise Unreadable(
                f"the weights {name} are {_sizes(there[name])}, its description asks for {_sizes(tensor)}"
            )
        if tensor.is_floating_point() != there[name].is_floating_point():
            raise Unreadable(
                f"the weights {name} are of {there[name].dtype}, its description asks for {tensor.dtype}"
            )
    if more := sorted(set(there) - set(wanted)):
        raise Unreadable(f"its description knows no weights {more[0]}")


def _sizes(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


def _compare_checksums(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len({member.filename for member in members}) != len(members):
                raise Unreadable("damaged (two parts of the same name)")
            # torch stores; what is compressed it did not write, and might have no end.
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise Unreadable("an archive of another kind than torch.save writes (TorchScript holds code)")
            if (damaged := archive.testzip()) is not None:
                raise Unreadable(f"damaged ({damaged} is not what was written)")
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise Unreadable("it is damaged or cut short, or of another program") from error
