"""Files of named tensors: torch's and safetensors, told apart by content.

Nothing here needs PyTorch, and nothing in a file is ever executed (`sam_flax.torch_pickle`).
"""

import json
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from sam_flax.errors import InputError
from sam_flax.files.torch_archive import LEGACY_MAGIC, is_torch_zip, read_torch_file, widen_bfloat16
from sam_flax.files.writing import PathLike, write_whole

MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors format
_SAFETENSORS_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def read_state_dict(path: PathLike) -> dict[str, np.ndarray]:
    """Reads the tensors of a `torch.save` file or a safetensors file, told apart by content.

    Neither imports PyTorch nor executes anything from the file.

    Args:
        path: official `.pth`, or `.safetensors`.

    Returns:
        name -> array as the file has it (bfloat16 is widened to float32); arrays may be read-only.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if the file is of another kind, damaged, or holds anything but tensors.
    """
    path = Path(path)
    if file_kind(path) == "torch":
        return read_torch_file(path)
    return read_safetensors(path)[0]


def file_kind(path: Path) -> Literal["torch", "safetensors"]:
    """Which of the two formats a file has, by its first bytes."""
    remedy = "give an official SAM .pth or a .safetensors file"
    if path.is_dir():
        raise InputError(f"Checkpoint {path} is a directory, not a file; {remedy}.")
    if not path.exists():
        raise FileNotFoundError(
            f"Checkpoint {path} does not exist; check the path, or use 'mini' for the model that ships."
        )
    try:
        with path.open("rb") as file:
            head = file.read(64)
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"Checkpoint {path} cannot be read ({error.strerror}); check its permissions.") from None
    if not head:
        raise InputError(f"Checkpoint {path} is empty; download or copy it again.")
    if is_torch_zip(head):
        return "torch"
    if head.startswith(LEGACY_MAGIC) or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        raise InputError(
            f"Checkpoint {path} is a bare pickle (torch.save before PyTorch 1.6, or not PyTorch at all), "
            "which is not read here; re-save it once with torch.save(torch.load(path, weights_only=True), "
            "new_path)."
        )
    if len(head) > 9 and head[8:9] == b"{":
        header = struct.unpack("<Q", head[:8])[0]
        if header > MAX_HEADER_BYTES or 8 + header > size:
            raise InputError(
                f"Checkpoint {path} declares a safetensors header of {header} bytes in a file of {size} "
                "bytes; it is truncated or damaged, download or copy it again."
            )
        return "safetensors"
    raise InputError(f"Checkpoint {path} is neither a torch.save file nor a safetensors file; {remedy}.")


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    with path.open("rb") as file:
        raw = file.read(struct.unpack("<Q", file.read(8))[0])
    try:
        # The package keeps the last of two equal keys; this pass is only for refusing them.
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
        with safe_open(path, framework="np") as file:
            tensors: dict[str, np.ndarray] = {}
            for name in file.keys():
                dtype = file.get_slice(name).get_dtype()
                if dtype == "BF16":  # not a NumPy type; the package has checked the offsets by now
                    start, end = header[name]["data_offsets"]
                    bits = np.fromfile(path, "<u2", (end - start) // 2, offset=8 + len(raw) + start)
                    tensors[name] = widen_bfloat16(bits).reshape(header[name]["shape"])
                elif dtype in _SAFETENSORS_DTYPES:
                    tensors[name] = file.get_tensor(name)
                else:
                    raise InputError(f"tensor {name[:80]!r} is of type {dtype}, which is not read")
            metadata = dict(file.metadata() or {})
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0][:160].rstrip(".")
        raise InputError(
            f"Checkpoint {path} is not a sound safetensors file ({reason}); download it again or re-save it."
        ) from None
    return tensors, metadata


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` for `json.loads`: a key given twice is a ValueError."""
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise InputError(f"the key {twice[:80]!r} appears twice")
    return result


def write_safetensors(path: PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes named tensors as one safetensors file, whole or not at all; the same arguments give the same bytes.

    Args:
        path: the file to write; an existing one is replaced.
        tensors: name -> array, of little-endian types that the format has; written in `safetensors_order`.
        metadata: text by text, written in the order given.

    Raises:
        OSError: if the file cannot be written; one sentence with path and remedy.
    """
    ordered = {name: np.ascontiguousarray(tensors[name]) for name in safetensors_order(tensors)}
    header = safetensors_header(ordered, metadata)
    # A view of bytes: of an array without elements there is no other, and `memoryview` knows no float16 by its size.
    write_whole(path, (header, *(tensor.reshape(-1).view(np.uint8).data for tensor in ordered.values())))


def safetensors_order(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Names with those of wide types first, so that every tensor starts at a multiple of its item size."""
    return sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))


def safetensors_header(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """What stands before the tensors' bytes in a safetensors file: the length of the header, and the header.

    The `safetensors` package writes metadata in random order; here equal models are equal files.

    Args:
        tensors: name -> array, in the order of the file.
        metadata: text by text, in the order of the file; it stands before the tensors.
    """
    names = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
