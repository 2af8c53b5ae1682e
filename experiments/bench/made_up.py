"""A quantized SAM without calibration, where only its shapes and arithmetic matter."""

from typing import Any

import jax.numpy as jnp

from ahcptq_jax import W4A4, Quantized
from ahcptq_jax.architectures.sites import flatten, unflatten
from ahcptq_jax.formats.artefact import quantizable_sites
from ahcptq_jax.quantizers import Grouped, Hybrid, Log2, Quantizer, Uniform
from ahcptq_jax.recipe import site_kind, weight_path
from ahcptq_jax.runtime.quantized import QuantizedWeight
from sam_flax import Sam
from sam_flax.config import SamConfig
from sam_flax.files.parameters import parameter_shapes


def random_quantized(config: SamConfig, params: dict[str, Any]) -> Quantized:
    """A W4A4 model of the given weights with plain weight ranges and made-up quantizers of the recipe's kinds."""
    flat, weights, activations = flatten(params), {}, {}
    for site, channels in quantizable_sites(config, parameter_shapes(config)).items():
        layer, width = weight_path(site), channels or 1
        activations[site] = _made_up(site_kind(site, W4A4) or "uniform", width)
        if layer:
            kernel = jnp.asarray(flat.pop(f"{layer}/kernel"))
            rows = kernel.reshape(-1, kernel.shape[-1])
            quantizer = Uniform.from_range(rows.min(0), rows.max(0), W4A4.w_bits)
            codes = quantizer.encode(kernel)
            weights[layer] = QuantizedWeight.from_codes(codes, quantizer.scale, quantizer.zero_point, W4A4.w_bits)
    return Quantized(unflatten(flat), weights, activations, Sam(config), W4A4)


def _made_up(kind: str, channels: int) -> Quantizer:
    uniform = Uniform.from_range(-3.0, 3.0, W4A4.a_bits)
    if kind == "grouped":
        scales = uniform.scale * jnp.asarray([0.5, 1.0, 1.5, 2.0])
        labels = jnp.arange(channels, dtype=jnp.int32) % 4
        return Grouped(scales, jnp.full(4, uniform.zero_point), labels, W4A4.a_bits)
    if kind == "hybrid":
        return Hybrid.from_range(-0.17, 4.0, 0.3, 0.25, W4A4.a_bits)
    if kind == "log2":
        return Log2(jnp.float32(0.1), jnp.int32(2), W4A4.a_bits)
    return uniform
