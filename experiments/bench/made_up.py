"""A quantized SAM without calibration, where only its shapes and arithmetic matter."""

from typing import Any

import jax.numpy as jnp

from ahcptq_jax import W4A4, QuantConfig, Quantized
from ahcptq_jax.architectures.sites import flatten, unflatten
from ahcptq_jax.formats.artefact import quantizable_sites
from ahcptq_jax.quantizers import Grouped, Hybrid, Log2, Quantizer, Uniform
from ahcptq_jax.quantizers.kinds import kind_of
from ahcptq_jax.recipe import site_kind, weight_path
from ahcptq_jax.runtime.quantized import QuantizedWeight
from sam_flax import Sam
from sam_flax.config import SamConfig
from sam_flax.files.parameters import parameter_shapes


def random_quantized(config: SamConfig, params: dict[str, Any], quant_config: QuantConfig = W4A4) -> Quantized:
    """A model of the given weights with plain weight ranges and made-up quantizers of the recipe's kinds."""
    flat, weights, activations = flatten(params), {}, {}
    for site, channels in quantizable_sites(config, parameter_shapes(config)).items():
        layer, width = weight_path(site), channels or 1
        made = _made_up(site_kind(site, quant_config, "sam_vit") or "uniform", width, quant_config.a_bits)
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
    return Quantized(unflatten(flat), weights, activations, Sam(config), quant_config)


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
