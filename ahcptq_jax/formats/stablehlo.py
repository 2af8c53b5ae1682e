"""Export: a quantized model's encoder and decoder as StableHLO, for places without this package.

A file is what `jax.export` serializes: the program with the packed codes, the quantizers and the float remainder
inside. JAX and its optional dependency flatbuffers run it, on the platforms it was exported for:

    exported = jax.export.deserialize(Path("encoder.jax").read_bytes())
    embeddings = jax.jit(exported.call)(canvas)

The inputs are those of `Quantized`: a normalised, padded canvas, and prompts in its pixels, any number of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export as jax_export

from ahcptq_jax.runtime.quantized import Quantized
from sam_flax.files.writing import write_whole
from sam_flax.stages import joined


def export_encoder(quantized: Quantized, platforms: Sequence[str] = ("cpu",)) -> bytes:
    """Serialized `(1, S, S, 3) float32 -> (1, g, g, C)`, or to a tuple where the embedding has several parts (SAM 2).

    Args:
        quantized: the model.
        platforms: those that it can run on, of "cpu", "cuda", "rocm" and "tpu".
    """
    size = quantized.config.img_size

    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return _serialize(partial(_encode, quantized), platforms, images)


def export_decoder(
    quantized: Quantized, points: int = 0, multimask_output: bool = False, platforms: Sequence[str] = ("cpu",)
) -> bytes:
    """Serialized decoder for any number N of prompts on one image.

    Args:
        quantized: the model.
        points: the number of points of each prompt. 0 makes a function of embeddings (1, g, g, C) and boxes (N, 4)
            float32; P > 0 one of embeddings, coordinates (N, P, 2) float32 and labels (N, P) int32, where -1 stands for
            no point.
        multimask_output: three masks for a prompt instead of one.
        platforms: as for `export_encoder`.

    Returns:
        The serialized function, which returns logits (N, M, 4g, 4g) and predicted IoU (N, M), M = 3 or 1.

    Raises:
        ValueError: if `points` is negative.
    """
    if points < 0:
        raise ValueError(f"points={points} must be 0, for boxes, or the points of each prompt.")
    size = quantized.config.img_size
    (number,) = jax_export.symbolic_shape("n")
    canvas = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    embeddings = jax.eval_shape(partial(_encode, quantized), canvas)

    def decode_boxes(embeddings: Any, boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _held(quantized).decode(embeddings, None, boxes, None, multimask_output)

    def decode_points(embeddings: Any, coords: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _held(quantized).decode(embeddings, (coords, labels), None, None, multimask_output)

    if points == 0:
        return _serialize(decode_boxes, platforms, embeddings, jax.ShapeDtypeStruct((number, 4), jnp.float32))
    coords = jax.ShapeDtypeStruct((number, points, 2), jnp.float32)
    return _serialize(decode_points, platforms, embeddings, coords, jax.ShapeDtypeStruct((number, points), jnp.int32))


def export(quantized: Quantized, folder: str | os.PathLike[str], platforms: Sequence[str] = ("cpu",)) -> None:
    """Writes `encoder.jax` and `decoder.jax` (boxes to single masks) into a folder, which is made if absent.

    Raises:
        OSError: if the folder cannot be written; each file is there whole or not at all.
    """
    folder = Path(folder)
    files = {
        "encoder.jax": export_encoder(quantized, platforms),
        "decoder.jax": export_decoder(quantized, platforms=platforms),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_whole(folder / name, [data])


def _encode(quantized: Quantized, images: jax.Array) -> Any:
    # Parts without their names: a file knows tuples alone.
    return joined(jax.tree.leaves(_held(quantized).encode_image(images)))


def _serialize(function: Callable, platforms: Sequence[str], *shapes: Any) -> bytes:
    exported = jax_export.export(jax.jit(function), platforms=list(platforms))(*shapes)
    return bytes(exported.serialize())


def _held(quantized: Quantized) -> Quantized:
    """The model behind a barrier: else a compiler unpacks the codes, constants here, and stores them as floats."""
    return jax.tree.map(jax.lax.optimization_barrier, quantized)
