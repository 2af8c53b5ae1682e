"""Weights as packed codes: the search of their ranges, and which layers are quantized."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from ahcptq_jax.architectures.sites import flatten, unflatten
from ahcptq_jax.calibration import saved_state
from ahcptq_jax.calibration.cache import StatisticsCache
from ahcptq_jax.quantizers import Uniform, searches
from ahcptq_jax.quantizers.weights import QuantizedWeight
from ahcptq_jax.recipe import Recipe, weight_path
from sam_flax.sam import Params


def quantize_weights(
    params: Params,
    sites: Iterable[str],
    recipe: Recipe,
    cache: StatisticsCache,
    bar: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> tuple[Params, dict[str, QuantizedWeight]]:
    """The weights of the layers whose inputs are quantized sites, and the parameters left in floating point.

    Args:
        params: in floating point, after all transforms.
        sites: paths of the quantized sites.
        recipe: says each layer's bits, by the site of its input.
        cache: weights quantized by earlier runs are taken from it, those of this one added.
        bar: shows progress over the layers.
    """
    layers = sorted((layer, site) for site in sites if (layer := weight_path(site)) is not None)
    inputs = dict(layers)
    flat, weights = flatten(params), {}
    for layer in bar([layer for layer, _ in layers]):
        choice = recipe.at(inputs[layer])
        assert choice is not None, f"{layer} has a quantized input that no rule names"
        kernel = flat.pop(f"{layer}/kernel")
        search = recipe.config.weight_search
        key = (saved_state.fingerprint(kernel), choice.w_bits, search)
        if key not in cache.weights:
            cache.weights[key] = quantize_weight(kernel, choice.w_bits, search=search)
        weights[layer] = cache.weights[key]
    return unflatten(flat), weights


def quantize_weight(kernel: Float[Array | np.ndarray, "*in out"], bits: int, *, search: bool) -> QuantizedWeight:
    """A kernel as packed codes, quantized per output channel.

    Args:
        kernel: the weights in floating point.
        bits: the width of the codes.
        search: searches each channel's range; else its minimum and maximum are taken.
    """
    kernel = jnp.asarray(kernel, jnp.float32)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    if search:
        quantizer = searches.search_weight(matrix, bits)
    else:
        quantizer = Uniform.from_range(matrix.min(0), matrix.max(0), bits)
    return _pack_weight(kernel, quantizer)


@jax.jit
def _pack_weight(kernel: Float32[Array, "*in out"], quantizer: Uniform) -> QuantizedWeight:
    codes = quantizer.encode(kernel)
    return QuantizedWeight.from_codes(codes, quantizer.scale, quantizer.zero_point, quantizer.bits)
