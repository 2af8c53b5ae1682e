"""The artefact: a `Quantized` model as one safetensors file, and back.

What a file holds, named by path:

| tensor | type | content |
|---|---|---|
| `params/<path>` | float16 or float32 | what is left in floating point |
| `weights/<layer>/codes` | uint8 | packed codes (`packing.pack`), C order of the kernel |
| `weights/<layer>/scale` | float32 (out,) | step of each output channel |
| `weights/<layer>/zero_point` | uint8 (out,) | its code of the value 0 |
| `activations/<site>` | float32 (fields, ...) | the quantizer's numbers, one row a field, see `FIELDS` |
| `activations/<site>/groups` | uint8 or uint16 (C,) | grouped quantizers: label of each channel |

The metadata has the format and its version, both configurations, the static fields of every weight and quantizer
(kind, bits, shape), and SHA-256 checksums: one for each tensor in the order of the header, and one for the header
itself, taken with its own digits replaced by zeros. Every byte of a file is under one of them. Nothing in a file is
executed, and nothing is allocated by what a file declares before the file has been found to be as long as that.

With `remainder="fp32"` a loaded model is the saved one, bit for bit. With "fp16" what stays in floating point is
rounded to 11 significant bits (below 2^-14 to a multiple of 2^-24); packed weights and quantizers are exact still. An
activation near a rounding boundary may then take the neighbouring code, so that outputs agree as two roundings of one
model do, not to the last bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from ahcptq_jax.architectures.sites import flatten, unflatten
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import Quantizer, Uniform, packing
from ahcptq_jax.quantizers.kinds import Kind, kind_named, kind_names, kind_of
from ahcptq_jax.recipe import RULES
from ahcptq_jax.runtime.quantized import Quantized, QuantizedWeight
from sam_flax.config import SamConfig
from sam_flax.files.checkpoint import parse_config
from sam_flax.files.parameters import parameter_shapes
from sam_flax.files.tensor_files import MAX_HEADER_BYTES, unique_keys
from sam_flax.files.trees import shown
from sam_flax.files.writing import write_whole
from sam_flax.sam import Sam

FORMAT = "ahcptq_jax"
VERSION = 1

Remainder = Literal["fp16", "fp32"]
REMAINDERS: dict[str, type] = {"fp16": np.float16, "fp32": np.float32}
_DIGEST = re.compile(rb'"header_sha256":"([0-9a-f]{64})"')
_NO_DIGEST = "0" * 64
_DTYPES = {"F16": np.float16, "F32": np.float32, "U8": np.uint8, "U16": np.uint16}
_REMEDY = "save it again with Quantized.save, or copy it again"


# ------------------------------------------------------------------------------------------------------- writing


def tensors_of(quantized: Quantized, remainder: Remainder = "fp16") -> dict[str, np.ndarray]:
    """What the file of a model holds, in the order of the file: tensor name -> array, as in the module's table.

    Raises:
        ValueError: if a number is not finite in the type of the remainder, or a quantizer is not sound.
    """
    if remainder not in REMAINDERS:
        raise ValueError(f"remainder={remainder!r} must be 'fp16' or 'fp32'.")
    tensors: dict[str, np.ndarray] = {}
    for path, value in flatten(quantized.params).items():
        with np.errstate(over="ignore"):
            array: np.ndarray = np.asarray(value).astype(REMAINDERS[remainder])
        if not np.isfinite(array).all():
            raise ValueError(
                f"Parameter {path} has values that are not finite as {remainder}; "
                + ("save with remainder='fp32'." if remainder == "fp16" else "quantize a sound checkpoint.")
            )
        tensors[f"params/{path}"] = array
    for layer, weight in quantized.weights.items():
        _check(f"Weight {layer}", Uniform(weight.scale, weight.zero_point, weight.bits), weight.shape[-1])
        tensors[f"weights/{layer}/codes"] = np.asarray(weight.packed)
        tensors[f"weights/{layer}/scale"] = np.asarray(weight.scale, np.float32)
        tensors[f"weights/{layer}/zero_point"] = np.asarray(weight.zero_point).astype(np.uint8)
    for site, quantizer in quantized.activations.items():
        _check(f"Quantizer {site}", quantizer)
        kind = kind_of(quantizer)
        rows = [np.asarray(getattr(quantizer, name), np.float32) for name in kind.fields]
        tensors[f"activations/{site}"] = np.stack(np.broadcast_arrays(*rows))
        for name in kind.channel_fields:
            values = np.asarray(getattr(quantizer, name))
            tensors[f"activations/{site}/{name}"] = values.astype(np.uint8 if values.max() < 256 else np.uint16)
    # Wide types first, so that every tensor starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    return {name: np.ascontiguousarray(tensors[name]) for name in order}


def _check(source: str, quantizer: Quantizer, channels: int | None = None) -> None:
    try:
        quantizer.validate(channels)
    except ValueError as error:
        raise ValueError(f"{source} is not sound: {error}.") from None


def header_bytes(quantized: Quantized, tensors: Mapping[str, np.ndarray], checksums: bool = True) -> bytes:
    """What stands before the tensors' bytes: the length of the header, and the header.

    Args:
        quantized: the model.
        tensors: what `tensors_of` returns for it.
        checksums: False writes zeros for them; the length is the same.
    """
    names = {np.dtype(value): key for key, value in _DTYPES.items()}
    digests = [hashlib.sha256(t.data).hexdigest() if checksums else _NO_DIGEST for t in tensors.values()]
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "sam_config": quantized.config.to_dict(),
        "quant_config": dataclasses.asdict(quantized.quant_config),
        "weights": {k: {"bits": w.bits, "shape": list(w.shape)} for k, w in sorted(quantized.weights.items())},
        "activations": {k: {"kind": kind_of(a).name, "bits": a.bits} for k, a in sorted(quantized.activations.items())},
        "sha256": digests,
    }
    text: dict[str, str] = {k: v if isinstance(v, str) else _json(v) for k, v in metadata.items()}
    text["header_sha256"] = _NO_DIGEST
    header: dict[str, Any] = {"__metadata__": text}
    offset = 0
    for name, tensor in tensors.items():
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    raw = _json(header).encode()
    raw += b" " * (-len(raw) % 8)
    digest = hashlib.sha256(raw).hexdigest() if checksums else _NO_DIGEST
    raw = _DIGEST.sub(f'"header_sha256":"{digest}"'.encode(), raw, count=1)
    return struct.pack("<Q", len(raw)) + raw


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def save(quantized: Quantized, path: str | os.PathLike[str], remainder: Remainder = "fp16") -> None:
    """Writes a model as one file, whole or not at all. The same model gives the same bytes.

    Args:
        quantized: the model.
        path: the file to write; an existing one is replaced.
        remainder: type on disk of the parameters left in floating point; see the module for what fp16 costs.

    Raises:
        ValueError: if the model is not sound, or `path` is no place for a file.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"The model cannot be saved as {path}; give a file name in an existing directory.")
    tensors = tensors_of(quantized, remainder)
    header = header_bytes(quantized, tensors)
    write_whole(path, (header, *(tensor.data for tensor in tensors.values())))


# ------------------------------------------------------------------------------------------------------- reading


class _Refused(Exception):
    """Why a file is not read: the end of a sentence that starts with its name."""


def load(path: str | os.PathLike[str], config: SamConfig | None = None) -> Quantized:
    """Reads what `save` wrote.

    Args:
        path: the file.
        config: the model that is expected; None takes any.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, of another kind or a newer version, or its parts do not fit together, or
            it is another model's.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"Quantized model {path} does not exist; check the path.")
    try:
        metadata, tensors = _read(path)
        found = _sam_config(metadata)
        if config is not None and config != found:
            wanted = config.to_dict()
            different = {name: value for name, value in found.to_dict().items() if value != wanted[name]}
            listed = ", ".join(f"{name}={value} (not {wanted[name]})" for name, value in different.items())
            raise _Refused(
                f"is of another model, with {listed}; give the file of the model that is asked for, or ask for "
                "that of the file (on the command line, with its floating-point weights: --checkpoint=…)"
            )
        return _build(found, metadata, tensors)
    except _Refused as error:
        raise ValueError(f"Quantized model {path} {error}.") from None
    except OSError as error:
        raise ValueError(f"Quantized model {path} cannot be read ({error.strerror}); give a readable file.") from None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and tensors of a file, after the checks that need no understanding of them."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else 0
        if start[8:] != b"{" or length > MAX_HEADER_BYTES or 8 + length > size:
            raise _Refused(f"is truncated, or not a file by Quantized.save; {_REMEDY}")
        file.seek(8)
        raw = file.read(length)
        header = _parse(raw)
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise _Refused(
                "was not written by Quantized.save; use sam_flax.load_sam for weights that are not quantized"
            )
        # Before the version, which a flipped byte could change: this checksum belongs to every version.
        blank, found = _DIGEST.subn(f'"header_sha256":"{_NO_DIGEST}"'.encode(), raw)
        if found != 1 or hashlib.sha256(blank).hexdigest() != metadata.get("header_sha256"):
            raise _Refused(f"is damaged: the checksum of its header is wrong; {_REMEDY}")
        version = _parse(metadata.get("version"), int)
        if version > VERSION:
            raise _Refused(f"is of format version {version} and this package reads up to {VERSION}; update the package")
        if version < 1:
            raise _Refused(f"is of the unknown format version {version}; {_REMEDY}")
        checksums = _parse(metadata.get("sha256"), list)
        if len(checksums) != len(header):
            raise _Refused(f"has {len(checksums)} checksums for {len(header)} tensors; {_REMEDY}")
        tensors, offset = {}, 0
        for (name, entry), checksum in zip(header.items(), checksums, strict=True):
            dtype, shape, count = _layout(name, entry, offset)
            offset += count * dtype.itemsize
            if 8 + length + offset > size:
                raise _Refused(f"is truncated: it ends inside {shown(name)}; {_REMEDY}")
            data = file.read(count * dtype.itemsize)
            if hashlib.sha256(data).hexdigest() != checksum:
                raise _Refused(f"is damaged: the checksum of {shown(name)} is wrong; {_REMEDY}")
            tensors[name] = np.frombuffer(data, dtype).reshape(shape)
        if 8 + length + offset != size:
            raise _Refused(f"has {size - 8 - length - offset} bytes too many at its end; {_REMEDY}")
    return metadata, tensors


def _layout(name: str, entry: Any, offset: int) -> tuple[np.dtype, tuple[int, ...], int]:
    """Type, shape and element count of a tensor that must start at `offset`."""
    if not isinstance(entry, dict) or entry.get("dtype") not in list(_DTYPES) or not _is_shape(entry.get("shape")):
        raise _Refused(f"has no readable type and shape for {shown(name)}; {_REMEDY}")
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), entry["shape"]
    count = math.prod(shape)
    if entry.get("data_offsets") != [offset, offset + count * dtype.itemsize]:
        raise _Refused(f"does not have {shown(name)} where the tensor before it ends; {_REMEDY}")
    return dtype, tuple(shape), count


def _parse(text: Any, kind: type = dict) -> Any:
    """JSON of one kind; refuses anything else, a key given twice included."""
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except (TypeError, ValueError, RecursionError):
        value = None
    if type(value) is not kind:
        raise _Refused(f"has a header that cannot be read; {_REMEDY}")
    return value


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, list)
        and len(shape) <= 8
        and all(type(n) is int and 0 <= n < 1 << 31 for n in shape)
        and math.prod(shape) < 1 << 40
    )


# ---------------------------------------------------------------------------------------------------- rebuilding


def _build(config: SamConfig, metadata: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> Quantized:
    """The model of a file; every part is checked against the configuration."""
    quant_config = _quant_config(_parse(metadata.get("quant_config")))
    # The tensors bound what a configuration can cost.
    if max(config.depth, config.decoder_depth, config.num_multimask_outputs, config.iou_head_depth) > len(tensors):
        raise _Refused(f"has a configuration of more layers than its {len(tensors)} tensors; {_REMEDY}")
    shapes = parameter_shapes(config)
    sites = quantizable_sites(config, shapes)
    rest = dict(tensors)

    def take(name: str, shape: tuple[int, ...] | None, *dtypes: type) -> np.ndarray:
        tensor = rest.pop(name, None)
        if tensor is None or tensor.dtype not in dtypes or shape not in (None, tensor.shape):
            raise _Refused(f"does not hold {shown(name)} as its metadata describes it; {_REMEDY}")
        return tensor

    weights: dict[str, QuantizedWeight] = {}
    for layer, static in _parse(metadata.get("weights")).items():
        shape = shapes.pop(f"{layer}/kernel", None)
        bits = static.get("bits") if isinstance(static, dict) else None
        if f"{layer}/input" not in sites or type(bits) is not int or static.get("shape") != list(shape or ()):
            raise _Refused(f"describes a quantized weight {shown(layer)} that its model does not have; {_REMEDY}")
        assert shape is not None
        zero_point = take(f"weights/{layer}/zero_point", shape[-1:], np.uint8).astype(np.float32)
        scale = take(f"weights/{layer}/scale", shape[-1:], np.float32)
        _sound(layer, kind_named("uniform"), shape[-1], scale=scale, zero_point=zero_point, bits=bits)
        packed = take(f"weights/{layer}/codes", (packing.packed_size(math.prod(shape), bits),), np.uint8)
        weights[layer] = QuantizedWeight(jnp.asarray(packed), jnp.asarray(scale), jnp.asarray(zero_point), shape, bits)

    activations: dict[str, Quantizer] = {}
    for site, static in _parse(metadata.get("activations")).items():
        name, bits = (static.get("kind"), static.get("bits")) if isinstance(static, dict) else (None, None)
        if site not in sites or type(name) is not str or type(bits) is not int:
            raise _Refused(f"describes a quantizer {shown(site)} that its model does not have; {_REMEDY}")
        if name not in kind_names():
            raise _Refused(f"has a quantizer of the unknown kind {shown(name)}; register it, or update the package")
        kind, channels = kind_named(name), sites[site]
        rows = take(f"activations/{site}", None, np.float32)
        if rows.ndim not in (1, 2) or len(rows) != len(kind.fields) or (channels is None and rows[0].size != 1):
            raise _Refused(f"does not hold the quantizer {shown(site)} as its metadata describes it; {_REMEDY}")
        fields: dict[str, Any] = dict(zip(kind.fields, rows, strict=True))
        for field in kind.channel_fields:
            if channels is None:
                raise _Refused(f"describes the channels of {shown(site)}, which has none; {_REMEDY}")
            values = take(f"activations/{site}/{field}", (channels,), np.uint8, np.uint16)
            fields[field] = values.astype(np.int32)
        activations[site] = _sound(site, kind, channels, bits=bits, **fields)

    params: dict[str, Any] = {}
    for path, shape in shapes.items():
        value = take(f"params/{path}", shape, np.float16, np.float32).astype(np.float32)
        if not np.isfinite(value).all():
            raise _Refused(f"has values in {shown(path)} that are not finite; {_REMEDY}")
        params[path] = jnp.asarray(value)
    if rest:
        raise _Refused(f"holds {shown(min(rest))}, which its metadata does not describe; {_REMEDY}")
    return Quantized(unflatten(params), weights, activations, Sam(config), quant_config)


def _sound(name: str, kind: Kind, channels: int | None, *, bits: int, **fields: np.ndarray) -> Any:
    """A validated quantizer with JAX arrays."""
    try:
        quantizer = kind.quantizer(**fields, bits=bits).validate(channels)
    except ValueError as error:
        raise _Refused(f"has an unsound quantizer for {shown(name)}: {error}; {_REMEDY}") from None
    arrays = {k: jnp.asarray(v, jnp.int32 if k in kind.whole_fields else None) for k, v in fields.items()}
    return dataclasses.replace(quantizer, **arrays)


def _sam_config(metadata: Mapping[str, Any]) -> SamConfig:
    try:
        return parse_config(str(metadata.get("sam_config")), "It")
    except ValueError as error:
        reason = str(error).removeprefix("It has ").split(";")[0].rstrip(".")
        raise _Refused(f"has no usable model configuration ({reason}); {_REMEDY}") from None


def _quant_config(values: dict[str, Any]) -> QuantConfig:
    known = {field.name for field in dataclasses.fields(QuantConfig)}
    if values.keys() != known:
        # A default in place of a missing value would be a guess at how the file was made.
        different = shown(", ".join(sorted(values.keys() ^ known)))
        raise _Refused(f"has quantization settings of another package version ({different}); quantize again")
    try:
        return QuantConfig(**values)
    except (TypeError, ValueError) as error:
        raise _Refused(f"has unusable quantization settings ({error}); {_REMEDY}") from None


def quantizable_sites(config: SamConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int | None]:
    """The sites that `recipe.RULES` can name: path -> size of the last axis there, None for attention maps."""
    sites: dict[str, int | None] = {}
    for path, shape in shapes.items():
        layer, _, leaf = path.rpartition("/")
        if leaf != "kernel":
            continue
        sites[f"{layer}/input"] = shape[-2]
        parent, _, name = layer.rpartition("/")
        if name in ("qkv", "q_proj"):
            width = config.head_dim if name == "qkv" else shape[-1] // config.decoder_num_heads
            sites |= {f"{parent}/{site}": width for site in "qkv"} | {f"{parent}/softmax": None}
    return {site: size for site, size in sites.items() if any(re.fullmatch(rule, site) for rule, _ in RULES)}
