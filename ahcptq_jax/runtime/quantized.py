"""`Quantized`: a SAM whose weights are packed b-bit codes and whose activations pass through quantizers."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.architectures import architecture_of
from ahcptq_jax.architectures.base import Operation
from ahcptq_jax.architectures.sites import below, flatten, unflatten
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.quantizers.weights import QuantizedWeight
from ahcptq_jax.runtime.products import Carrier
from ahcptq_jax.runtime.quantized_layers import RecordCodes, intercept_quantized
from sam_flax.layers import in_float32
from sam_flax.sam import Params, Points
from sam_flax.stages import Stage

# What the methods `save` and `summary` call; `formats`, which imports this module, puts its functions here.
FILE_FUNCTIONS: dict[str, Callable[..., Any]] = {}


def with_decoded(params: Params, weights: Mapping[str, QuantizedWeight]) -> Params:
    """Parameters with the kernels of the quantized layers filled in."""
    flat = flatten(params)
    flat |= {f"{path}/kernel": weight.decode() for path, weight in weights.items()}
    return unflatten(flat)


def _with_placeholders(params: Params, weights: Mapping[str, QuantizedWeight]) -> Params:
    """Parameters with kernels that the modules declare and nothing reads."""
    flat = flatten(params)
    return unflatten(flat | {f"{path}/kernel": jnp.zeros(weight.shape) for path, weight in weights.items()})


Codes = dict[str, jax.Array]  # site path -> uint8 codes


def _recorder(codes: Codes) -> RecordCodes:
    def record(path: str, value: jax.Array) -> None:
        codes[path] = value.astype(jnp.uint8)

    return record


@partial(jax.jit, static_argnames=("operation", "grid_bits", "carrier", "record"))
@in_float32
def _apply(
    operation: Operation,
    params: Params,
    weights: dict[str, QuantizedWeight],
    activations: dict[str, Quantizer],
    inputs: tuple[Any, ...],
    grid_bits: int,
    carrier: Carrier,
    record: bool,
) -> tuple[Any, Codes]:
    """A part of the model on levels: its output, and the codes at its quantized sites if `record`."""
    codes: Codes = {}
    with intercept_quantized(weights, activations, grid_bits, carrier, _recorder(codes) if record else None):
        return operation(_with_placeholders(params, weights), *inputs), codes


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "weights", "activations"],
    meta_fields=["sam", "quant_config", "carrier"],
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized SAM, usable wherever `SamPredictor` takes a model.

    Attributes:
        params: the parameters left in floating point, nested as in the original tree.
        weights: layer path -> packed weight, e.g. "image_encoder/blocks_0/attn/qkv".
        activations: site path -> quantizer, e.g. "image_encoder/blocks_0/attn/softmax".
        sam: the module, of any registered architecture; static.
        quant_config: what it was quantized with; static.
        carrier: what carries the sums of products, "int8" or "float32", with equal results; see `products`. Static, not
            saved.
    """

    params: Params
    weights: dict[str, QuantizedWeight]
    activations: dict[str, Quantizer]
    sam: Any
    quant_config: QuantConfig
    carrier: Carrier = "int8"

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.sam.config

    @property
    def _way(self) -> tuple[int, Carrier]:
        return self.quant_config.grid_bits, self.carrier

    def encode_image(self, images: jax.Array) -> Any:
        """Images (B, S, S, 3), normalised and padded -> embeddings, (B, g, g, C) where there is but one.

        Weights are unpacked stage by stage, so only one stage is ever held whole.
        """
        return self.encode_with_codes(images, record=False)[0]

    def encode_with_codes(self, images: jax.Array, record: bool = True) -> tuple[Any, Codes]:
        """`encode_image`, and the codes at every quantized site.

        Args:
            images: as for `encode_image`.
            record: False returns no codes.
        """
        architecture, flat = architecture_of(self.sam), flatten(self.params)
        found: Codes = {}

        def apply(stage: Stage, inputs: tuple[Any, ...]) -> Any:
            own = unflatten(below(stage.prefix, flat))
            weights, activations = below(stage.prefix, self.weights), below(stage.prefix, self.activations)
            x, codes = _apply(Operation(stage.module), own, weights, activations, inputs, *self._way, record)
            found.update({stage.prefix + site: value for site, value in codes.items()})
            return x

        embedded = architecture.embed(self.sam, self.params, jnp.asarray(images))
        return architecture.stages(self.sam).run(embedded, apply), found

    def decode(
        self,
        image_embeddings: Any,
        points: Points | None = None,
        boxes: jax.Array | None = None,
        masks: jax.Array | None = None,
        multimask_output: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """See `sam_flax.Sam.decode`."""
        return self.decode_with_codes(image_embeddings, points, boxes, masks, multimask_output, record=False)[0]

    def decode_with_codes(
        self,
        image_embeddings: Any,
        points: Points | None = None,
        boxes: jax.Array | None = None,
        masks: jax.Array | None = None,
        multimask_output: bool = True,
        record: bool = True,
    ) -> tuple[tuple[jax.Array, jax.Array], Codes]:
        """`decode`, and the codes at every quantized site; arguments as in `encode_with_codes`."""
        architecture = architecture_of(self.sam)
        parts = tuple(f"{part}/" for part in architecture.decoder_parts)
        weights = {path: weight for path, weight in self.weights.items() if path.startswith(parts)}
        activations = {site: quantizer for site, quantizer in self.activations.items() if site.startswith(parts)}
        inputs = (image_embeddings, points, boxes, masks)
        operation = Operation(self.sam, "decode", (("multimask_output", multimask_output),))
        params = architecture.decoder(self.params)
        return _apply(operation, params, weights, activations, inputs, *self._way, record)

    def with_rounded_remainder(self) -> "Quantized":
        """The model with what stays in floating point rounded to float16's values, which halves its share of a file.

        A parameter that is beyond float16's range stays as it is. 11 significant bits (below 2^-14 a multiple of 2^-24)
        are kept; an activation near a rounding boundary may then take the neighbouring code.
        """

        def rounded(value: jax.Array) -> jax.Array:
            half = np.asarray(value, np.float32).astype(np.float16)
            return jnp.asarray(half, jnp.float32) if np.isfinite(half).all() else value

        with np.errstate(over="ignore"):
            return dataclasses.replace(self, params=jax.tree.map(rounded, self.params))

    def float_params(self) -> Params:
        """All parameters in floating point, quantized weights decoded."""
        return with_decoded(self.params, self.weights)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model as one safetensors file, which `ahcptq_jax.load` reads; see `ahcptq_jax.save`."""
        FILE_FUNCTIONS["save"](self, path)

    def summary(self) -> Any:
        """What every layer became and weighs in the file of `save`; print it for a table."""
        return FILE_FUNCTIONS["summarize"](self)

    def nbytes(self) -> dict[str, int]:
        """Bytes held: `fp32` before quantization, `quantized` now (packed codes, quantizers, float remainder)."""
        remainder = sum(int(np.prod(a.shape)) for a in jax.tree.leaves(self.params))
        original = remainder + sum(int(np.prod(w.shape)) for w in self.weights.values())
        held = sum(jnp.asarray(leaf).nbytes for leaf in jax.tree.leaves(self))
        return {"fp32": 4 * original, "quantized": held}
