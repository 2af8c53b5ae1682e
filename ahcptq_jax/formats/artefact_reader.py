"""The reader of artefacts: checks every byte of a file, then rebuilds the model that `artefact.save` wrote.

A file may come from anywhere. It is first found to be whole, by lengths and checksums; then each of its parts is
checked against the model's configuration, and each quantizer by its kind.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ahcptq_jax.architectures import Architecture, architecture_named
from ahcptq_jax.architectures.sites import unflatten
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.formats.artefact_format import DIGEST, DTYPES, FORMAT, NO_DIGEST, REMEDY, VERSION
from ahcptq_jax.quantizers import Quantizer, packing
from ahcptq_jax.quantizers.kinds import Kind, kind_named, kind_names
from ahcptq_jax.quantizers.weights import QuantizedWeight
from ahcptq_jax.runtime.quantized import Quantized
from sam_flax.errors import InputError
from sam_flax.files.tensor_files import MAX_HEADER_BYTES, unique_keys
from sam_flax.files.trees import shown


class _Refused(Exception):
    """The reason for which a file is not read: the end of a sentence that starts with the file's name."""


def load(path: str | os.PathLike[str], config: Any = None) -> Quantized:
    """The model of a file that `artefact.save` wrote.

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
    """The provenance in a file: how its model came about. The rest of the file is checked by `load` only.

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
            raise _Refused(f"is truncated, or not a file by Quantized.save; {REMEDY}")
        file.seek(8)
        raw = file.read(length)
        header = _parse(raw)
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise _Refused(
                "was not written by Quantized.save; use sam_flax.load_sam for weights that are not quantized"
            )
        # Before the version, which a flipped byte could change: this checksum belongs to every version.
        blank, found = DIGEST.subn(f'"header_sha256":"{NO_DIGEST}"'.encode(), raw)
        if found != 1 or hashlib.sha256(blank).hexdigest() != metadata.get("header_sha256"):
            raise _Refused(f"is damaged: the checksum of its header is wrong; {REMEDY}")
        version = _parse(metadata.get("version"), int)
        if version > VERSION:
            raise _Refused(f"is of format version {version} and this package reads up to {VERSION}; update the package")
        if version < 1:
            raise _Refused(f"is of the unknown format version {version}; {REMEDY}")
        checksums = _parse(metadata.get("sha256"), list)
        if len(checksums) != len(header):
            raise _Refused(f"has {len(checksums)} checksums for {len(header)} tensors; {REMEDY}")
        tensors, offset = {}, 0
        for (name, entry), checksum in zip(header.items(), checksums, strict=True):
            dtype, shape, count = _layout(name, entry, offset)
            offset += count * dtype.itemsize
            if 8 + length + offset > size:
                raise _Refused(f"is truncated: it ends inside {shown(name)}; {REMEDY}")
            data = file.read(count * dtype.itemsize)
            if hashlib.sha256(data).hexdigest() != checksum:
                raise _Refused(f"is damaged: the checksum of {shown(name)} is wrong; {REMEDY}")
            tensors[name] = np.frombuffer(data, dtype).reshape(shape)
        if 8 + length + offset != size:
            raise _Refused(f"has {size - 8 - length - offset} bytes too many at its end; {REMEDY}")
    return metadata, tensors


def _layout(name: str, entry: Any, offset: int) -> tuple[np.dtype, tuple[int, ...], int]:
    """Type, shape and element count of a tensor that must start at `offset`."""
    if not isinstance(entry, dict) or entry.get("dtype") not in list(DTYPES) or not _is_shape(entry.get("shape")):
        raise _Refused(f"has no readable type and shape for {shown(name)}; {REMEDY}")
    dtype, shape = np.dtype(DTYPES[entry["dtype"]]), entry["shape"]
    count = math.prod(shape)
    if entry.get("data_offsets") != [offset, offset + count * dtype.itemsize]:
        raise _Refused(f"does not have {shown(name)} where the tensor before it ends; {REMEDY}")
    return dtype, tuple(shape), count


def _parse(text: Any, kind: type = dict) -> Any:
    """JSON of one kind; refuses anything else, a key given twice included."""
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except (TypeError, ValueError, RecursionError):
        value = None
    if type(value) is not kind:
        raise _Refused(f"has a header that cannot be read; {REMEDY}")
    return value


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, list)
        and len(shape) <= 8
        and all(type(n) is int and 0 <= n < 1 << 31 for n in shape)
        and math.prod(shape) < 1 << 40
    )


class _Tensors:
    """The tensors of a file, each taken once by the part of the model that it belongs to."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._rest = dict(tensors)

    def take(self, name: str, shape: tuple[int, ...] | None, *dtypes: type) -> np.ndarray:
        """The tensor of a name, which must have one of the types and, unless it is None, the shape."""
        tensor = self._rest.pop(name, None)
        if tensor is None or tensor.dtype not in dtypes or shape not in (None, tensor.shape):
            raise _Refused(f"does not hold {shown(name)} as its metadata describes it; {REMEDY}")
        return tensor

    def check_all_taken(self) -> None:
        """Refuses a file with tensors that no part of the model has taken."""
        if self._rest:
            raise _Refused(f"holds {shown(min(self._rest))}, which its metadata does not describe; {REMEDY}")


def _build(
    architecture: Architecture, config: Any, metadata: Mapping[str, Any], tensors: dict[str, np.ndarray]
) -> Quantized:
    """The model of a file; every part is checked against the configuration."""
    quant_config = _quant_config(_provenance(metadata).get("quant_config"))
    # The tensors bound what a configuration can cost.
    if architecture.most_repeated(config) > len(tensors):
        raise _Refused(f"has a configuration of more layers than its {len(tensors)} tensors; {REMEDY}")
    module = architecture.module(config)
    assert module is not None, f"{architecture.name} does not know its own configuration"
    shapes, sites, rest = architecture.shapes(module), architecture.sites(module), _Tensors(tensors)
    weights: dict[str, QuantizedWeight] = {}
    for layer, static in _parse(metadata.get("weights")).items():
        shape = shapes.pop(f"{layer}/kernel", None) if f"{layer}/input" in sites else None
        weights[layer] = _weight(layer, static, shape, rest)
    activations: dict[str, Quantizer] = {}
    for site, static in _parse(metadata.get("activations")).items():
        if site not in sites:
            raise _Refused(f"describes a quantizer {shown(site)} that its model does not have; {REMEDY}")
        activations[site] = _quantizer(site, static, sites[site], rest)
    params: dict[str, Any] = {}
    for path, shape in shapes.items():
        value = rest.take(f"params/{path}", shape, np.float16, np.float32).astype(np.float32)
        if not np.isfinite(value).all():
            raise _Refused(f"has values in {shown(path)} that are not finite; {REMEDY}")
        params[path] = jnp.asarray(value)
    rest.check_all_taken()
    return Quantized(unflatten(params), weights, activations, module, quant_config)


def _weight(layer: str, static: Any, shape: tuple[int, ...] | None, rest: _Tensors) -> QuantizedWeight:
    """The weight of a layer, whose kernel has this shape; None if the model has no such layer."""
    bits = static.get("bits") if isinstance(static, dict) else None
    if shape is None or type(bits) is not int or static.get("shape") != list(shape):
        raise _Refused(f"describes a quantized weight {shown(layer)} that its model does not have; {REMEDY}")
    if static.get("kind", "uniform") != "uniform":
        raise _Refused(f"has a weight {shown(layer)} of a kind that is not read here; update the package")
    zero_point = rest.take(f"weights/{layer}/zero_point", shape[-1:], np.uint8).astype(np.float32)
    scale = rest.take(f"weights/{layer}/scale", shape[-1:], np.float32)
    _sound(layer, kind_named("uniform"), shape[-1], {"scale": scale, "zero_point": zero_point}, {"bits": bits})
    packed = rest.take(f"weights/{layer}/codes", (packing.packed_size(math.prod(shape), bits),), np.uint8)
    return QuantizedWeight(jnp.asarray(packed), jnp.asarray(scale), jnp.asarray(zero_point), shape, bits)


def _quantizer(site: str, static: Any, channels: int | None, rest: _Tensors) -> Quantizer:
    """The quantizer of a site with so many channels; None for an attention map, which has none."""
    name, bits = (static.get("kind"), static.get("bits")) if isinstance(static, dict) else (None, None)
    if type(name) is not str or type(bits) is not int:
        raise _Refused(f"describes a quantizer {shown(site)} that its model does not have; {REMEDY}")
    if name not in kind_names():
        raise _Refused(f"has a quantizer of the unknown kind {shown(name)}; register it, or update the package")
    kind = kind_named(name)
    rows = rest.take(f"activations/{site}", None, np.float32)
    if rows.ndim not in (1, 2) or len(rows) != len(kind.fields) or (channels is None and rows[0].size != 1):
        raise _Refused(f"does not hold the quantizer {shown(site)} as its metadata describes it; {REMEDY}")
    fields: dict[str, Any] = dict(zip(kind.fields, rows, strict=True))
    for field in kind.channel_fields:
        if channels is None:
            raise _Refused(f"describes the channels of {shown(site)}, which has none; {REMEDY}")
        values = rest.take(f"activations/{site}/{field}", (channels,), np.uint8, np.uint16)
        fields[field] = values.astype(np.int32)
    return _sound(site, kind, channels, fields, _static_fields(site, kind, static))


def _static_fields(name: str, kind: Kind, static: Mapping[str, Any]) -> dict[str, int]:
    """The whole numbers of a quantizer that are no tensors; those that a file does not have are at their defaults."""
    fields = {key: static[key] for key in ("bits", *kind.static_fields) if key in static}
    if any(type(value) is not int for value in fields.values()):
        raise _Refused(f"describes a quantizer {shown(name)} that its model does not have; {REMEDY}")
    return fields


def _sound(
    name: str, kind: Kind, channels: int | None, fields: Mapping[str, np.ndarray], static: Mapping[str, int]
) -> Any:
    """A validated quantizer with JAX arrays."""
    try:
        quantizer = kind.quantizer(**fields, **static).validate(channels)
    except (TypeError, ValueError) as error:
        raise _Refused(f"has an unsound quantizer for {shown(name)}: {error}; {REMEDY}") from None
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
        raise _Refused(f"has no usable model configuration ({reason}); {REMEDY}") from None


def _provenance(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance in the metadata, {} if there is none; in version 1 it is the settings alone."""
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
