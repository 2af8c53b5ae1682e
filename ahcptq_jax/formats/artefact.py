"""The artefact: a `Quantized` model as one safetensors file, and back.

What a file holds, named by path:

| tensor | type | content |
|---|---|---|
| `params/<path>` | float16 or float32 | what is left in floating point |
| `weights/<layer>/codes` | uint8 | packed codes (`packing.pack`), C order of the kernel |
| `weights/<layer>/scale` | float32 (out,) | step of each output channel |
| `weights/<layer>/zero_point` | uint8 (out,) | its code of the value 0 |
| `activations/<site>` | float32 (fields, ...) | the quantizer's numbers, one row for each of its kind's `fields` |
| `activations/<site>/<field>` | uint8 or uint16 (C,) | a whole number per channel, such as CAG's group labels |

The metadata has the format and its version, the model's configuration, and for every weight and quantizer its kind,
bits, shape and whatever else its kind has that is no tensor. So a file names all that reading it needs. How the model
came about (`provenance`: the settings and the package's version, and what the caller adds) stands beside it as free
JSON that nothing depends on. SHA-256 checksums, one for each tensor in the order of the header and one for the header
itself, taken with its own digits replaced by zeros, cover every byte. Nothing in a file is executed, and nothing is
allocated by what a file declares before the file has been found to be as long as that.

A loaded model is the saved one, bit for bit: a parameter is stored in float16 where all its values are float16's, as
`round_remainder` makes them and `quantize` returns them, and else in float32.

Version 1, still read, has no kinds of weights, and the settings in place of the provenance.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ahcptq_jax.architectures import Architecture, architecture_named, architecture_of
from ahcptq_jax.architectures.sites import flatten, unflatten
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import Quantizer, Uniform, packing
from ahcptq_jax.quantizers.kinds import Kind, kind_named, kind_names, kind_of
from ahcptq_jax.quantizers.weights import QuantizedWeight
from ahcptq_jax.recipe import recipe_of
from ahcptq_jax.runtime.quantized import FILE_FUNCTIONS, Quantized
from sam_flax.config import SamConfig
from sam_flax.errors import InputError
from sam_flax.files.tensor_files import MAX_HEADER_BYTES, unique_keys
from sam_flax.files.trees import shown
from sam_flax.files.writing import write_whole
from sam_flax.sam import Sam

FORMAT = "ahcptq_jax"
VERSION = 2

_DIGEST = re.compile(rb'"header_sha256":"([0-9a-f]{64})"')
_NO_DIGEST = "0" * 64
_DTYPES = {"F16": np.float16, "F32": np.float32, "U8": np.uint8, "U16": np.uint16}
_REMEDY = "save it again with Quantized.save, or copy it again"


# ------------------------------------------------------------------------------------------------------- writing


def tensors_of(quantized: Quantized) -> dict[str, np.ndarray]:
    """What the file of a model holds, in the order of the file: tensor name -> array, as in the module's table.

    Raises:
        ValueError: if a number is not finite, or a quantizer is not sound.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, value in flatten(quantized.params).items():
        array = np.asarray(value, np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"Parameter {path} has values that are not finite; quantize a sound checkpoint.")
        with np.errstate(over="ignore"):
            half: np.ndarray = array.astype(np.float16)
        tensors[f"params/{path}"] = half if np.array_equal(half, array) else array
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


def header_bytes(
    quantized: Quantized,
    tensors: Mapping[str, np.ndarray],
    provenance: Mapping[str, Any] | None = None,
    *,
    checksums: bool = True,
) -> bytes:
    """What stands before the tensors' bytes: the length of the header, and the header.

    Args:
        quantized: the model.
        tensors: what `tensors_of` returns for it.
        provenance: what the caller adds to it, serializable as JSON.
        checksums: False writes zeros for them; the length is the same.
    """
    architecture = architecture_of(quantized.sam)
    digests = [hashlib.sha256(t.data).hexdigest() if checksums else _NO_DIGEST for t in tensors.values()]
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": architecture.name,
        "sam_config": quantized.config.to_dict(),
        "weights": {k: _static_of_weight(w) for k, w in sorted(quantized.weights.items())},
        "activations": {k: _static_of(a) for k, a in sorted(quantized.activations.items())},
        "provenance": {
            "package": _package(),
            "quant_config": dataclasses.asdict(quantized.quant_config),
            "transforms": recipe_of(architecture, quantized.quant_config).transforms,
            **(provenance or {}),
        },
        "sha256": digests,
    }
    names = {np.dtype(value): key for key, value in _DTYPES.items()}
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


def _package() -> str:
    try:
        return f"ahcptq_jax {importlib.metadata.version('ahcptq-jax')}"
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "ahcptq_jax"


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _static_of_weight(weight: QuantizedWeight) -> dict[str, Any]:
    return {"kind": "uniform", "bits": weight.bits, "shape": list(weight.shape)}


def _static_of(quantizer: Quantizer) -> dict[str, Any]:
    kind = kind_of(quantizer)
    more = {name: getattr(quantizer, name) for name in kind.static_fields}
    return {"kind": kind.name, "bits": quantizer.bits, **more}


def save(quantized: Quantized, path: str | os.PathLike[str], *, provenance: Mapping[str, Any] | None = None) -> None:
    """Writes a model as one file, whole or not at all. The same model gives the same bytes.

    Args:
        quantized: the model.
        path: the file to write; an existing one is replaced.
        provenance: what is to be said of how the model came about, besides its settings; serializable as JSON.

    Raises:
        ValueError: if the model is not sound.
        InputError: if `path` is no place for a file.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"The model cannot be saved as {path}; give a file name in an existing directory.")
    tensors = tensors_of(quantized)
    header = header_bytes(quantized, tensors, provenance)
    write_whole(path, (header, *(tensor.data for tensor in tensors.values())))


# ------------------------------------------------------------------------------------------------------- reading


class _Refused(Exception):
    """Why a file is not read: the end of a sentence that starts with its name."""


def load(path: str | os.PathLike[str], config: Any = None) -> Quantized:
    """Reads what `save` wrote.

    Args:
        path: the file.
        config: the model that is expected; None takes any.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if the file is damaged, of another kind or a newer version, or its parts do not fit together, or
            it is another model's.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"Quantized model {path} does not exist; check the path.")
    try:
        metadata, tensors = _read(path)
        architecture = _architecture(metadata)
        found = _sam_config(architecture, metadata)
        if config is not None and config != found:
            wanted = config.to_dict()
            different = {name: value for name, value in found.to_dict().items() if value != wanted[name]}
            listed = ", ".join(f"{name}={value} (not {wanted[name]})" for name, value in different.items())
            raise _Refused(
                f"is of another model, with {listed}; give the file of the model that is asked for, or ask for "
                "that of the file (on the command line, with its floating-point weights: --checkpoint=…)"
            )
        return _build(architecture, found, metadata, tensors)
    except _Refused as error:
        raise InputError(f"Quantized model {path} {error}.") from None
    except OSError as error:
        raise InputError(f"Quantized model {path} cannot be read ({error.strerror}); give a readable file.") from None


def read_provenance(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file says of how its model came about; `load` checks the rest of it.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if the file is damaged or of another kind.
    """
    path = Path(path)
    try:
        metadata, _ = _read(path)
        return _provenance(metadata)
    except _Refused as error:
        raise InputError(f"Quantized model {path} {error}.") from None


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


def _build(
    architecture: Architecture, config: Any, metadata: Mapping[str, Any], tensors: dict[str, np.ndarray]
) -> Quantized:
    """The model of a file; every part is checked against the configuration."""
    quant_config = _quant_config(_provenance(metadata).get("quant_config"))
    # The tensors bound what a configuration can cost.
    if architecture.most_repeated(config) > len(tensors):
        raise _Refused(f"has a configuration of more layers than its {len(tensors)} tensors; {_REMEDY}")
    module = architecture.module(config)
    assert module is not None, f"{architecture.name} does not know its own configuration"
    shapes, sites = architecture.shapes(module), architecture.sites(module)
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
        if static.get("kind", "uniform") != "uniform":
            raise _Refused(f"has a weight {shown(layer)} of a kind that is not read here; update the package")
        assert shape is not None
        zero_point = take(f"weights/{layer}/zero_point", shape[-1:], np.uint8).astype(np.float32)
        scale = take(f"weights/{layer}/scale", shape[-1:], np.float32)
        _sound(layer, kind_named("uniform"), shape[-1], {"scale": scale, "zero_point": zero_point}, {"bits": bits})
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
        activations[site] = _sound(site, kind, channels, fields, _static_fields(site, kind, static))

    params: dict[str, Any] = {}
    for path, shape in shapes.items():
        value = take(f"params/{path}", shape, np.float16, np.float32).astype(np.float32)
        if not np.isfinite(value).all():
            raise _Refused(f"has values in {shown(path)} that are not finite; {_REMEDY}")
        params[path] = jnp.asarray(value)
    if rest:
        raise _Refused(f"holds {shown(min(rest))}, which its metadata does not describe; {_REMEDY}")
    return Quantized(unflatten(params), weights, activations, module, quant_config)


def _static_fields(name: str, kind: Kind, static: Mapping[str, Any]) -> dict[str, int]:
    """The whole numbers of a quantizer that are no tensors; those that a file does not have are at their defaults."""
    fields = {key: static[key] for key in ("bits", *kind.static_fields) if key in static}
    if any(type(value) is not int for value in fields.values()):
        raise _Refused(f"describes a quantizer {shown(name)} that its model does not have; {_REMEDY}")
    return fields


def _sound(
    name: str, kind: Kind, channels: int | None, fields: Mapping[str, np.ndarray], static: Mapping[str, int]
) -> Any:
    """A validated quantizer with JAX arrays."""
    try:
        quantizer = kind.quantizer(**fields, **static).validate(channels)
    except (TypeError, ValueError) as error:
        raise _Refused(f"has an unsound quantizer for {shown(name)}: {error}; {_REMEDY}") from None
    arrays = {k: jnp.asarray(v, jnp.int32 if k in kind.whole_fields else None) for k, v in fields.items()}
    return dataclasses.replace(quantizer, **arrays)


def _architecture(metadata: Mapping[str, Any]) -> Architecture:
    """The family of a file's model; files that do not say are of the one that there was."""
    name = str(metadata.get("architecture", "sam_vit"))
    try:
        return architecture_named(name)
    except ValueError:
        raise _Refused(
            f"is of the unknown architecture {shown(name)}; update the package, or register the architecture"
        ) from None


def _sam_config(architecture: Architecture, metadata: Mapping[str, Any]) -> Any:
    try:
        return architecture.parse_config(str(metadata.get("sam_config")), "It")
    except ValueError as error:
        reason = str(error).removeprefix("It has ").split(";")[0].rstrip(".")
        raise _Refused(f"has no usable model configuration ({reason}); {_REMEDY}") from None


def _provenance(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """How the model came about, as far as the file says; version 1 says its settings alone."""
    if "quant_config" in metadata:  # version 1
        return {"quant_config": _parse(metadata["quant_config"])}
    return _parse(metadata["provenance"]) if "provenance" in metadata else {}


def _quant_config(values: Any) -> QuantConfig:
    """The settings that a file's provenance names, as far as this version of the package knows them.

    What the model computes depends on its quantizers alone, so that a setting which is not known here, or not yet known
    there, is no reason to refuse a file.
    """
    # Files that do not know the grid are off it.
    kept = QuantConfig(grid_bits=0)
    for field in dataclasses.fields(QuantConfig) if isinstance(values, dict) else ():
        if field.name in values:
            value = values[field.name]
            # What was a tuple is a list in JSON.
            found: dict[str, Any] = {field.name: tuple(value) if isinstance(value, list) else value}
            try:
                kept = dataclasses.replace(kept, **found)
            except (TypeError, ValueError):
                continue
    return kept


def quantizable_sites(config: SamConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int | None]:
    """The sites that the official recipe quantizes: path -> size of the last axis there, None for attention maps."""
    del shapes
    architecture = architecture_of(Sam(config))
    recipe = recipe_of(architecture, QuantConfig())
    return {site: size for site, size in architecture.sites(Sam(config)).items() if recipe.at(site)}


FILE_FUNCTIONS["save"] = save
