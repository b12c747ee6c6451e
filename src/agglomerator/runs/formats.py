"""The files that bring weights, read without running what they carry.

They are PyTorch's archives, its older files (before 1.6) and safetensors. The weights in them are a
state dict, alone or under a usual name, and the names in that may have prefixes.
"""

import json
import re
import zipfile

import safetensors
import torch
from torch import _weights_only_unpickler as unpickler
from torch import serialization

from agglomerator.model.shapes import DERIVED
from agglomerator.util.errors import UserError

# Names that published checkpoints pickle beside their tensors. None of them is needed: an inert
# object takes the place of each, and any other name is a reason to refuse the file.
PASSED_OVER = ("builtins.getattr", "torch.optim.", "pytorch_lightning.", "pl_bolts.")

# What a state dict lies under: Lightning, DeepSpeed, and habits.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")

# What wrappers of a network put before its names: DataParallel, Lightning, and habits.
PREFIXES = re.compile(r"^((module|model|net|network)\.)+")
COMPILED = "_orig_mod."  # torch.compile, of a part of the network too

ARCHIVE, LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF"  # how the files begin


class _Inert:
    """Takes the place of whatever a pickle names; does nothing with what it is given."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def load(path, where):
    """What a file holds, whichever of the formats it has.

    Args:
        path: of the file.
        where: the flag that named it, for messages.

    Returns:
        The content; of safetensors a dictionary of `state_dict` and `hyper_parameters`, as far as
        the metadata tell.

    Raises:
        UserError: it cannot be read, is of another kind or damaged, or carries code.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}).") from None
    try:
        if head.startswith(ARCHIVE):
            return _load_archive(path, where)
        if head.startswith(LEGACY):
            return _load_legacy(path, where)
        if head[8:] == b"{":
            return _load_safetensors(path)
    except UserError:
        raise
    except Exception:  # damaged archives and pickles raise anything
        raise UserError(
            f"{where}: is damaged, or no checkpoint that can be read safely; copy it anew, or save "
            "the network's state_dict()."
        ) from None
    raise UserError(f"{where}: is cut short or no checkpoint at all; copy or write it anew.")


def _load_archive(path, where):
    with zipfile.ZipFile(path) as archive:
        # PyTorch packs nothing; what is packed can unpack to more than the memory.
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
        if packed or archive.testzip() is not None:
            raise zipfile.BadZipFile
    foreign = serialization.get_unsafe_globals_in_checkpoint(path)
    with path.open("rb") as file, _inert(foreign, where):
        return torch.load(file, map_location="cpu", weights_only=True)


def _load_legacy(path, where):
    with path.open("rb") as file:
        # Five pickles: magic number, version, system, content, and the order of the tensors' data.
        named = set().union(*(unpickler.get_globals_in_pkl(file) for _ in range(5)))
        file.seek(0)
        with _inert(named - unpickler._get_allowed_globals().keys(), where):
            content = torch.load(file, map_location="cpu", weights_only=True)
        if file.read(1):
            raise EOFError  # there are data that belong to no tensor, and perhaps one without
    return content


def _inert(foreign, where):
    """Lets foreign names of a pickle stand for inert objects, while it is entered; raises UserError
    if there are others than those that published checkpoints have."""
    refused = sorted(name for name in foreign if not name.startswith(PASSED_OVER))
    if refused:
        raise UserError(
            f"{where}: carries code ({', '.join(refused[:3])}), which a checkpoint has no need of; "
            "refused, nothing of it was run. Save the network's state_dict() alone."
        )
    return serialization.safe_globals([(_Inert, name) for name in foreign])


def _load_safetensors(path):
    with safetensors.safe_open(path, framework="pt") as file:
        # Copies: the file may be written anew while the weights are in use.
        weights = {name: file.get_tensor(name).clone() for name in file.offset_keys()}
        metadata = file.metadata() or {}
    return {
        "state_dict": weights,
        "hyper_parameters": {name: _value(text) for name, text in metadata.items()},
    }


def _value(text):
    """The number, truth value or None that a text of metadata stands for, or the text itself."""
    try:
        return json.loads({"None": "null", "True": "true", "False": "false"}.get(text, text))
    except (ValueError, RecursionError):
        return text


def weights_of(content, where, n_bytes):
    """The state dict in what `load` returned, with the names that the network itself gives.

    Args:
        content: from `load`.
        where: the flag that named the file, for messages.
        n_bytes: size of the file.

    Raises:
        UserError: there is none, or it is none of tensors that the file holds.
    """
    found = content
    for _ in range(4):
        inner = (found.get(name) for name in WRAPPERS) if isinstance(found, dict) else ()
        found = next((value for value in inner if isinstance(value, dict)), found)
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and _is_plain(value) for name, value in found.items()
    ):
        raise UserError(f"{where}: holds no state dict of tensors; it is no checkpoint of a model.")
    weights = {}
    for name, value in found.items():
        own = PREFIXES.sub("", name.replace(COMPILED, ""))
        if own in weights:
            raise UserError(
                f"{where}: holds {own} more than once; save one network's state_dict()."
            )
        weights[own] = value.detach()
    # Strides of zero claim a tensor far larger than what the file holds of it.
    if sum(value.numel() * value.element_size() for value in found.values()) > n_bytes:
        raise UserError(f"{where}: claims tensors larger than the file; copy or write it anew.")
    return weights


def _is_plain(value):
    """Whether it is a tensor of real numbers, one beside the other."""
    return (
        isinstance(value, torch.Tensor)
        and not (value.is_nested or value.is_quantized or value.is_complex() or value.is_meta)
        and value.layout is torch.strided
    )


def check_numbers(weights, where):
    """Raises UserError unless all weights are finite numbers, in float32 too."""
    floats = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for name, value in weights.items():
        if name.endswith(DERIVED):
            continue
        if value.dtype not in floats:
            kind = str(value.dtype).removeprefix("torch.")
            raise UserError(f"{where}: {name} is of {kind}; save it as float32.")
        if not value.float().isfinite().all():
            raise UserError(
                f"{where}: {name} has values that are not finite; take an earlier checkpoint, or "
                "train anew with a smaller --learning_rate."
            )
