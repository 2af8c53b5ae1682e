"""A quantized segmenter of any family without calibration, where only its shapes and arithmetic matter."""

from typing import Any

import jax.numpy as jnp

from ahcptq_jax import W4A4, QuantConfig, Quantized
from ahcptq_jax.architectures import architecture_of, module_of
from ahcptq_jax.architectures.sites import flatten, unflatten
from ahcptq_jax.quantizers import Grouped, Hybrid, Log2, Quantizer, Uniform
from ahcptq_jax.quantizers.kinds import kind_of
from ahcptq_jax.recipe import recipe_of, weight_path
from ahcptq_jax.runtime.quantized import QuantizedWeight
from sam_flax.config import SegmenterConfig


def random_quantized(config: SegmenterConfig, params: dict[str, Any], quant_config: QuantConfig = W4A4) -> Quantized:
    """A model of the given weights with plain weight ranges and made-up quantizers of the recipe's kinds."""
    flat, weights, activations = flatten(params), {}, {}
    sam = module_of(config)
    architecture = architecture_of(sam)
    recipe = recipe_of(architecture, quant_config)
    for site, channels in architecture.sites(sam).items():
        if (choice := recipe.at(site)) is None:
            continue
        layer, made = weight_path(site), _made_up(choice.kind, channels or 1, quant_config.a_bits)
        grid = quant_config.grid_bits
        activations[site] = kind_of(made).on_grid(made, grid) if grid else made
        if layer:
            kernel = jnp.asarray(flat.pop(f"{layer}/kernel"))
            rows = kernel.reshape(-1, kernel.shape[-1])
            quantizer = Uniform.from_range(rows.min(0), rows.max(0), quant_config.w_bits)
            codes = quantizer.encode(kernel)
            weights[layer] = QuantizedWeight.from_codes(
                codes, quantizer.scale, quantizer.zero_point, quant_config.w_bits
            )
    return Quantized(unflatten(flat), weights, activations, sam, quant_config)


def _made_up(kind: str, channels: int, bits: int) -> Quantizer:
    uniform = Uniform.from_range(-3.0, 3.0, bits)
    if kind == "grouped":
        scales = uniform.scale * jnp.asarray([0.5, 1.0, 1.5, 2.0])
        labels = jnp.arange(channels, dtype=jnp.int32) % 4
        return Grouped(scales, jnp.full(4, uniform.zero_point), labels, bits)
    if kind == "hybrid":
        return Hybrid.from_range(-0.17, 4.0, 0.3, 0.25, bits)
    if kind == "log2":
        return Log2(jnp.float32(0.1), jnp.int32(2), bits)
    if kind == "uniform":
        return uniform
    raise ValueError(f"There is no made-up quantizer of kind {kind!r}; write one here.")
