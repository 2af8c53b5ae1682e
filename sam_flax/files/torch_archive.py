"""Reads the tensors of a `torch.save` file without PyTorch.

A `torch.save` file is a zip archive of stored (uncompressed) records: `<top>/data.pkl`, a pickle that describes the
objects (`sam_flax.torch_pickle`), and `<top>/data/<key>`, the raw bytes of each storage (torch/serialization.py).
"""

import math
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from sam_flax.errors import InputError
from sam_flax.files.torch_pickle import RESAVE, Opaque, Refused, Storage, Tensor, interpret, kind_of, short

# How torch.save began its files before PyTorch 1.6.
LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
MAX_PICKLE_BYTES = 8 << 20  # the pickle of SAM-H, names and shapes only, takes about 0.1 MB
# Numbers that tensors may show beyond those stored: where one is expanded, or a storage has many names.
MAX_REPEATED = 1 << 26
# Under what a state dict is found in the checkpoints that training writes, the first that is there.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights")
MAX_WRAPPERS = 4


def is_torch_zip(head: bytes) -> bool:
    """Whether a file that starts with `head` is a zip archive."""
    return head.startswith(b"PK\x03\x04")


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 numbers (uint16) -> the same numbers as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def read_torch_file(path: Path) -> dict[str, np.ndarray]:
    """Reads a state dict that `torch.save` wrote in its zip format.

    A state dict inside `{"model": ...}`, `{"state_dict": ...}`, `{"net": ...}` and their like is found, at some depth;
    what stands beside the tensors is left out.

    Args:
        path: the file.

    Returns:
        name -> array in the file's dtype, bfloat16 widened to float32. Arrays may be read-only views.

    Raises:
        InputError: if the archive is damaged, names anything but tensors, or describes tensors out of bounds.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive, path.stat().st_size)
    except Refused as error:
        raise InputError(f"Checkpoint {path} {error}.") from None
    except zipfile.BadZipFile as error:
        raise InputError(
            f"Checkpoint {path} is a truncated or damaged zip archive ({error}); download or copy it again."
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, struct.error, zlib.error, OverflowError) as error:
        # zipfile reports damaged central directories through any of these.
        raise InputError(
            f"Checkpoint {path} cannot be read as a zip archive ({_first_line(error)}); download or copy it again."
        ) from None


def _read_archive(archive: zipfile.ZipFile, file_size: int) -> dict[str, np.ndarray]:
    records = _checked_records(archive, file_size)
    pickles = [name for name in records if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise Refused(
            f"is a zip archive but not one that torch.save wrote (it holds {len(pickles)} data.pkl "
            f"records, not 1); {RESAVE}"
        )
    top = pickles[0].removesuffix("data.pkl")
    info = records[pickles[0]]
    if info.file_size > MAX_PICKLE_BYTES:
        raise Refused(
            f"describes its tensors in {info.file_size} bytes, over the limit of {MAX_PICKLE_BYTES}; {RESAVE}"
        )
    byteorder = records.get(f"{top}byteorder")
    big_endian = byteorder is not None and archive.read(byteorder) == b"big"

    described = _tensors_of(interpret(archive.read(info)))
    storages: dict[Storage, np.ndarray] = {}
    for tensor in described.values():
        if tensor.storage not in storages:
            storages[tensor.storage] = _read_storage(archive, records, top, tensor.storage, big_endian)
    arrays = {name: _view(name, tensor, storages[tensor.storage]) for name, tensor in described.items()}
    viewed, held = sum(a.size for a in arrays.values()), sum(s.size for s in storages.values())
    if viewed - held > MAX_REPEATED:
        raise Refused(f"shows its {held} numbers as {viewed}, far more than models share; {RESAVE}")
    return arrays


def _checked_records(archive: zipfile.ZipFile, file_size: int) -> dict[str, zipfile.ZipInfo]:
    """The archive's records by name, after the checks that bound what reading them can cost."""
    records: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if info.filename in records:
            raise Refused(f"holds the record {info.filename[:80]!r} twice; download it again or {RESAVE}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise Refused(f"compresses its record {info.filename[:80]!r}, which torch.save never does; {RESAVE}")
        records[info.filename] = info
    declared = sum(info.file_size for info in records.values())
    if declared > file_size:
        raise Refused(
            f"declares {declared} bytes of content in a file of {file_size} bytes; download it again or {RESAVE}"
        )
    return records


def _read_storage(
    archive: zipfile.ZipFile,
    records: dict[str, zipfile.ZipInfo],
    top: str,
    storage: Storage,
    big_endian: bool,
) -> np.ndarray:
    dtype = np.dtype((">" if big_endian else "<") + ("u2" if storage.dtype == "bfloat16" else storage.dtype))
    info = records.get(f"{top}data/{storage.key}")
    if info is None:
        raise Refused(f"lacks the data of storage {storage.key[:40]!r}; download or copy it again")
    if info.file_size != storage.numel * dtype.itemsize:
        raise Refused(
            f"holds {info.file_size} bytes for storage {storage.key[:40]!r} but declares {storage.numel} x "
            f"{dtype.itemsize}; download or copy it again"
        )
    values = np.frombuffer(archive.read(info), dtype)
    if storage.dtype == "bfloat16":
        return widen_bfloat16(values)
    return values.astype(dtype.newbyteorder("="), copy=False)


def _view(name: str, tensor: Tensor, storage: np.ndarray) -> np.ndarray:
    """The strided view that a tensor takes of its storage, bounds checked first."""
    shape, stride = tensor.shape, tensor.stride
    count = math.prod(shape)
    last = tensor.offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if (count and last >= storage.size) or count - storage.size > MAX_REPEATED:
        raise Refused(
            f"declares tensor {name[:80]!r} of shape {short(shape)} outside its storage of {storage.size} "
            "elements; download or copy it again"
        )
    if not count:
        return np.zeros(shape, storage.dtype)
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], shape, strides, writeable=False)


def _tensors_of(value: Any) -> dict[str, Tensor]:
    """The tensors by name of the state dict that a file holds, alone or beside whatever else a training run saves."""
    entries = _state_dict(value)
    if not entries:
        raise Refused(f"holds an empty state dict; {RESAVE}")
    tensors = dict(filter(_is_named_tensor, entries.items()))
    if not tensors:
        name, other = next(iter(entries.items()))
        if not isinstance(name, str):
            raise Refused(f"has a key of type {kind_of(name)} where a parameter name belongs; {RESAVE}")
        raise Refused(f"holds a {kind_of(other)} under {short(name)!r} where a tensor belongs; {RESAVE}")
    return tensors


def _state_dict(value: Any) -> dict[Any, Any]:
    """The dictionary that holds tensors, behind at most `MAX_WRAPPERS` others."""
    for _ in range(MAX_WRAPPERS):
        entries = _entries(value)
        if entries is None:
            break
        inner = {k: v for k, v in entries.items() if isinstance(k, str) and _entries(v)}
        found = {k: v for k, v in inner.items() if any(map(_is_named_tensor, (_entries(v) or {}).items()))}
        if known := [inner[k] for k in WRAPPERS if k in inner]:
            value = known[0]
        elif any(map(_is_named_tensor, entries.items())) or not found:
            return entries
        elif len(found) > 1:
            names = ", ".join(repr(short(name)) for name in list(found)[:8])
            raise Refused(f"holds several dictionaries of tensors ({names}), none of a usual name; {RESAVE} alone")
        else:
            (value,) = found.values()
    entries = _entries(value)
    if entries is None:
        raise Refused(f"holds a {kind_of(value)} where a state dict belongs; {RESAVE}")
    return entries


def _entries(value: Any) -> dict[Any, Any] | None:
    """The entries of a dictionary of any class, or the state dict of a whole module; None for other values."""
    if not isinstance(value, Opaque):
        return value if isinstance(value, dict) else None
    if "_modules" in value.entries:
        return _module_state(value)
    return value.entries or None


def _module_state(module: Opaque) -> dict[Any, Any]:
    """The state dict of a module that was saved whole, by walking its parameters, buffers and parts."""
    state: dict[Any, Any] = {}
    seen, left = {id(module)}, [("", module)]
    while left:
        prefix, part = left.pop()
        for group in ("_parameters", "_buffers"):
            for name, value in (_entries(part.entries.get(group)) or {}).items():
                if _is_named_tensor((name, value)):
                    state[prefix + name] = value
        for name, child in (_entries(part.entries.get("_modules")) or {}).items():
            # Each part once, and not as deep as no model is: the file may say anything.
            if isinstance(child, Opaque) and isinstance(name, str) and id(child) not in seen and len(prefix) < 1000:
                seen.add(id(child))
                left.append((f"{prefix}{name}.", child))
    return state


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120].rstrip(".")
