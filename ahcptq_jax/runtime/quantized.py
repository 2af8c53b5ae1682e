"""`Quantized`: a SAM whose weights are packed b-bit codes and whose activations pass through quantizers."""

import dataclasses
import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.architectures.sites import below, flatten, unflatten
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import Quantizer, Uniform, packing
from ahcptq_jax.runtime.products import Carrier
from ahcptq_jax.runtime.quantized_layers import Note, intercept_quantized
from sam_flax.config import SamConfig
from sam_flax.encoders.vit import Block, Neck, PatchEmbed
from sam_flax.layers import in_float32
from sam_flax.sam import Params, Points, Sam, apply_embed, call, check_canvas, encoder_stages

if TYPE_CHECKING:
    from ahcptq_jax.formats.summary import Summary


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed", "scale", "zero_point"],
    meta_fields=["shape", "bits"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A weight as packed codes.

    The following conditions hold:
      * `packed` is uint8, the codes in C order (see `packing.pack`);
      * `scale` and `zero_point` are (out,), `out` being the last axis of `shape`.
    """

    packed: jax.Array
    scale: jax.Array
    zero_point: jax.Array
    shape: tuple[int, ...]
    bits: int

    @classmethod
    def from_codes(cls, codes: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: int) -> "QuantizedWeight":
        """Packs integer codes of the weight's shape."""
        return cls(packing.pack(codes, bits), scale, zero_point, tuple(codes.shape), bits)

    def codes(self) -> jax.Array:
        """uint8 codes of `shape`."""
        return packing.unpack(self.packed, self.bits, self.shape)

    def decode(self) -> jax.Array:
        """float32 weight of `shape`."""
        return Uniform(self.scale, self.zero_point, self.bits).decode(self.codes())


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


def _recorder(codes: Codes) -> Note:
    def note(path: str, value: jax.Array) -> None:
        codes[path] = value.astype(jnp.uint8)

    return note


@partial(jax.jit, static_argnames=("module", "carrier", "record"))
@in_float32
def _apply_stage(
    module: Block | Neck,
    params: Params,
    weights: dict[str, QuantizedWeight],
    activations: dict[str, Quantizer],
    x: jax.Array,
    carrier: Carrier,
    record: bool,
) -> tuple[jax.Array, Codes]:
    codes: Codes = {}
    with intercept_quantized(weights, activations, carrier, _recorder(codes) if record else None):
        return call(module, _with_placeholders(params, weights), x), codes


@partial(jax.jit, static_argnames=("sam", "multimask_output", "carrier", "record"))
@in_float32
def _apply_decode(
    sam: Sam,
    params: Params,
    weights: dict[str, QuantizedWeight],
    activations: dict[str, Quantizer],
    prompts: tuple[jax.Array, Points | None, jax.Array | None, jax.Array | None],
    multimask_output: bool,
    carrier: Carrier,
    record: bool,
) -> tuple[tuple[jax.Array, jax.Array], Codes]:
    codes: Codes = {}
    with intercept_quantized(weights, activations, carrier, _recorder(codes) if record else None):
        return call(sam, _with_placeholders(params, weights), *prompts, multimask_output, method="decode"), codes


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
        sam: the module; static.
        quant_config: what it was quantized with; static.
        carrier: what carries the sums over codes, see `products` and `integer.integer_model`; static, not saved.
    """

    params: Params
    weights: dict[str, QuantizedWeight]
    activations: dict[str, Quantizer]
    sam: Sam
    quant_config: QuantConfig
    carrier: Carrier = "float32"

    @property
    def config(self) -> SamConfig:
        """The model's configuration."""
        return self.sam.config

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Images (B, S, S, 3), normalised and padded -> embeddings (B, g, g, C).

        Weights are unpacked block by block, so only one block is ever held whole.
        """
        return self.encode_with_codes(images, record=False)[0]

    def encode_with_codes(self, images: jax.Array, record: bool = True) -> tuple[jax.Array, Codes]:
        """`encode_image`, and the codes at every quantized site.

        Args:
            images: as for `encode_image`.
            record: False returns no codes.
        """
        check_canvas(images, self.config)
        encoder = self.params["image_encoder"]
        embed = PatchEmbed(self.config.patch_size, self.config.embed_dim, parent=None)
        x = apply_embed(embed, {k: encoder[k] for k in ("patch_embed", "pos_embed")}, images)
        found: Codes = {}
        for key, module in encoder_stages(self.config):
            prefix = f"image_encoder/{key}/"
            weights, activations = below(prefix, self.weights), below(prefix, self.activations)
            x, codes = _apply_stage(module, encoder.get(key, {}), weights, activations, x, self.carrier, record)
            found |= {prefix + site: value for site, value in codes.items()}
        return x, found

    def decode(
        self,
        image_embeddings: jax.Array,
        points: Points | None = None,
        boxes: jax.Array | None = None,
        masks: jax.Array | None = None,
        multimask_output: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """See `sam_flax.Sam.decode`."""
        return self.decode_with_codes(image_embeddings, points, boxes, masks, multimask_output, record=False)[0]

    def decode_with_codes(
        self,
        image_embeddings: jax.Array,
        points: Points | None = None,
        boxes: jax.Array | None = None,
        masks: jax.Array | None = None,
        multimask_output: bool = True,
        record: bool = True,
    ) -> tuple[tuple[jax.Array, jax.Array], Codes]:
        """`decode`, and the codes at every quantized site; arguments as in `encode_with_codes`."""
        params = {k: self.params[k] for k in ("prompt_encoder", "mask_decoder")}
        weights = {k: v for k, v in self.weights.items() if k.startswith("mask_decoder/")}
        activations = {k: v for k, v in self.activations.items() if k.startswith("mask_decoder/")}
        prompts = (image_embeddings, points, boxes, masks)
        return _apply_decode(self.sam, params, weights, activations, prompts, multimask_output, self.carrier, record)

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
        """Writes the model as one safetensors file, which `ahcptq_jax.load` reads; see `ahcptq_jax.artefact.save`."""
        from ahcptq_jax.formats import artefact

        artefact.save(self, path)

    def summary(self) -> "Summary":
        """What every layer became and weighs in the file of `save`; print it for a table."""
        from ahcptq_jax.formats import summary

        return summary.summarize(self)

    def nbytes(self) -> dict[str, int]:
        """Bytes held: `fp32` before quantization, `quantized` now (packed codes, quantizers, float remainder)."""
        remainder = sum(int(np.prod(a.shape)) for a in jax.tree.leaves(self.params))
        original = remainder + sum(int(np.prod(w.shape)) for w in self.weights.values())
        held = sum(jnp.asarray(leaf).nbytes for leaf in jax.tree.leaves(self))
        return {"fp32": 4 * original, "quantized": held}
