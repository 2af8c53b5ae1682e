"""`export_onnx`: a model as two files that run without this package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from ahcptq_jax.formats.onnx import graph as graphs
from ahcptq_jax.formats.onnx.decoder import decoder_graph
from ahcptq_jax.formats.onnx.encoder import encoder_graph
from ahcptq_jax.formats.onnx.layers import Model
from ahcptq_jax.formats.onnx.sam2_decoder import sam2_decoder_graph
from ahcptq_jax.runtime.quantized import Quantized
from sam_flax.encoders.hiera import Sam2Config
from sam_flax.sam import SamModel

# Attention maps of this size stay in the cache that the cores of a processor share.
PART_BYTES = 16 * 2**20


def export_onnx(
    model: Quantized | SamModel,
    folder: str | os.PathLike[str],
    *,
    products: Literal["integer", "qdq"] = "integer",
    single_mask: bool = False,
    external_data: bool | None = None,
    part_bytes: int = PART_BYTES,
    vnni: bool = False,
) -> None:
    """Writes `encoder.onnx` and `decoder.onnx` into a folder, which is made if absent.

    The files need nothing but a runtime of ONNX's standard operators (opset 21, 4-bit integers). The encoder takes
    `images` (1, 3, S, S), normalised and padded like the public PyTorch encoder's, to `image_embeddings` (1, C, g, g);
    the decoder has the inputs and outputs of segment_anything's own export, see `decoder.decoder_graph`. SAM 2's
    encoder gives three features, which its decoder takes: see `sam2_decoder.sam2_decoder_graph`.

    Weights stay packed: 4-bit codes in UINT4 tensors, wider ones in int8. Every quantized product is one
    `MatMulInteger` of 8-bit levels. Quantizers that are not on the integer grid are exported as the nearest that are.

    Args:
        model: what to export, quantized or in floating point.
        folder: where.
        products: "integer" runs fast as it is. "qdq" writes `QuantizeLinear` and `DequantizeLinear` around products of
            floats, for compilers that look for these (TensorRT, OpenVINO, FINN through QONNX's converters). They can
            say uniform quantizers of 4 and 8 bits; not groups of channels with a scale each (CAG), logarithmic codes
            (HLUQ, AGQ) or other widths.
        single_mask: the decoder gives the best mask of each prompt instead of all four.
        external_data: whether constants lie in files of their own, `encoder.onnx.data` and `decoder.onnx.data`; by
            default where they are too large for one file (from 1.5 GB).
        part_bytes: attention maps larger than this, in bytes of float32, are made in parts.
        vnni: 8-bit weights, keys and values are int8, whose products are up to twice as fast on x86-64 with VNNI (most
            since 2019) and on ARM. Wrong where there is AVX2 without VNNI, on which sums of pairs of such products
            overflow 16 bits; without it the file computes the same everywhere.

    Raises:
        InputError: if onnx is not installed, the model is of another family than SAM, MobileSAM and SAM 2, or a
            quantizer has no form there.
        OSError: if the folder cannot be written; each file is there whole or not at all.
    """
    folder = Path(folder)
    parts = Model.of(model, part_bytes, plain=products == "qdq", vnni=vnni)
    decode = sam2_decoder_graph if isinstance(parts.config, Sam2Config) else decoder_graph
    made = {"encoder.onnx": encoder_graph(parts), "decoder.onnx": decode(parts, single_mask)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, (graph, inputs, outputs) in made.items():
        graphs.write(graph, inputs, outputs, folder / name, external_data)
