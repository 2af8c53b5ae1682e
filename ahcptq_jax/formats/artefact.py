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
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from ahcptq_jax.architectures import architecture_of
from ahcptq_jax.architectures.sites import flatten
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.formats.artefact_format import DIGEST, DTYPES, FORMAT, NO_DIGEST, VERSION
from ahcptq_jax.formats.artefact_reader import load as load
from ahcptq_jax.formats.artefact_reader import read_provenance as read_provenance
from ahcptq_jax.quantizers import Quantizer, Uniform
from ahcptq_jax.quantizers.kinds import kind_of
from ahcptq_jax.quantizers.weights import QuantizedWeight
from ahcptq_jax.recipe import recipe_of
from ahcptq_jax.runtime.quantized import FILE_FUNCTIONS, Quantized
from sam_flax.config import SamConfig
from sam_flax.errors import InputError
from sam_flax.files.writing import write_whole
from sam_flax.sam import Sam


def tensors_of(quantized: Quantized) -> dict[str, Shaped[np.ndarray, ...]]:
    """The tensors of a model's file by name, as in the table above, in the order of the file.

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
    tensors: Mapping[str, Shaped[np.ndarray, ...]],
    provenance: Mapping[str, Any] | None = None,
    *,
    checksums: bool = True,
) -> bytes:
    """The bytes before those of the tensors: the length of the header, and the header.

    Args:
        quantized: the model.
        tensors: its tensors, as `tensors_of` returns them.
        provenance: the caller's additions to it, serializable as JSON.
        checksums: False writes zeros for them; the length is the same.
    """
    architecture = architecture_of(quantized.sam)
    digests = [hashlib.sha256(t.data).hexdigest() if checksums else NO_DIGEST for t in tensors.values()]
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
    names = {np.dtype(value): key for key, value in DTYPES.items()}
    text: dict[str, str] = {k: v if isinstance(v, str) else _json(v) for k, v in metadata.items()}
    text["header_sha256"] = NO_DIGEST
    header: dict[str, Any] = {"__metadata__": text}
    offset = 0
    for name, tensor in tensors.items():
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    raw = _json(header).encode()
    raw += b" " * (-len(raw) % 8)
    digest = hashlib.sha256(raw).hexdigest() if checksums else NO_DIGEST
    raw = DIGEST.sub(f'"header_sha256":"{digest}"'.encode(), raw, count=1)
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
        provenance: how the model came about, besides its settings; serializable as JSON.

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


def quantizable_sites(config: SamConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int | None]:
    """The sites that the official recipe quantizes: path -> size of the last axis there, None for attention maps."""
    del shapes
    architecture = architecture_of(Sam(config))
    recipe = recipe_of(architecture, QuantConfig())
    return {site: size for site, size in architecture.sites(Sam(config)).items() if recipe.at(site)}


FILE_FUNCTIONS["save"] = save
