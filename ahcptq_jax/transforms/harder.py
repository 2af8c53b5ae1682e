"""A SAM that computes the same and is harder to quantize.

Real SAMs have activations whose channels differ by orders of magnitude and keys with two peaks; a small model trained
for an hour has neither. Here a model is given both by rewriting its parameters, none of which changes what it computes
in floating point:

  * gains, powers of two (products are then the same to the bit): a norm's output channels times g, the rows of the
    linear or convolution that follows divided by g; a decoder MLP's hidden channels likewise, ReLU being homogeneous;
  * offsets of a norm's output channels, whose image under the following linear is taken from its bias. (Not where
    zeros are padded between the two: the padding would miss the offset.)
  * a positive or negative constant on each key channel of token-to-image attention: it shifts all scores of a query
    alike, which softmax does not see.

GELU is not homogeneous, and a residual stream is read by many: neither can hide a change, and both are left alone.
"""

import zlib
from typing import Any

import numpy as np

from ahcptq_jax.architectures import architecture_of, module_of
from ahcptq_jax.architectures.base import Rewritable
from ahcptq_jax.architectures.sites import flatten, unflatten
from ahcptq_jax.transforms.base import Context, Transform, register
from sam_flax.errors import InputError
from sam_flax.sam import Params

# Of strength 1: deviation of log2(gain); scale of the offsets (Laplace) in units of the norm's typical output; distance
# of the key peaks from zero in deviations of a key channel.
_GAIN = 1.0
_OFFSET = 1.0
_KEY = 8.0
_LARGEST_EXPONENT = 4


def make_harder(params: Params, config: Any, strength: float, seed: int = 0) -> Params:
    """Parameters of the same function with uneven channels and bimodal keys.

    Args:
        params: the model's.
        config: the model's.
        strength: 0 changes nothing; 1 spreads gains over about two octaves each way. At most 4.
        seed: decides gains, offsets and signs.

    Raises:
        InputError: if the strength is out of range.
    """
    sam = module_of(config)
    return rewrite(params, architecture_of(sam).rewritable(sam), strength, seed)


def rewrite(params: Params, places: Rewritable, strength: float, seed: int = 0) -> Params:
    """`make_harder` at the given places of a model."""
    _check_strength(strength)
    if strength == 0:
        return params
    flat: dict[str, Any] = {path: np.asarray(value, np.float32) for path, value in flatten(params).items()}
    for norm, layer, offsets in places.norms:
        _spread_norm(flat, norm, layer, strength, seed, offsets=offsets)
    for first, second in places.hidden:
        _spread_hidden(flat, first, second, strength, seed)
    for layer in places.keys:
        _part_keys(flat, layer, strength, seed)
    return unflatten(flat)


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= 4:
        raise InputError(f"strength={strength} must lie in 0..4.")


def _generator(path: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(path.encode())])


def _gains(rng: np.random.Generator, channels: int, strength: float) -> np.ndarray:
    exponents = np.round(rng.normal(0, strength * _GAIN, channels))
    return np.exp2(np.clip(exponents, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)).astype(np.float32)


def _divide_inputs(flat: dict[str, Any], layer: str, gains: np.ndarray) -> None:
    kernel = flat[f"{layer}/kernel"]  # (..., in, out)
    flat[f"{layer}/kernel"] = kernel / gains[:, None]


def _spread_norm(flat: dict[str, Any], norm: str, layer: str, strength: float, seed: int, *, offsets: bool) -> None:
    """Gains, and offsets if wanted, from a norm's output into the layer behind it."""
    rng = _generator(norm, seed)
    if offsets:
        typical = np.sqrt(np.mean(np.square(flat[f"{norm}/scale"])))
        offset = rng.laplace(0, strength * _OFFSET * typical, flat[f"{norm}/bias"].shape)
        image = offset @ flat[f"{layer}/kernel"].astype(np.float64)
        flat[f"{norm}/bias"] = (flat[f"{norm}/bias"] + offset).astype(np.float32)
        flat[f"{layer}/bias"] = (flat[f"{layer}/bias"] - image).astype(np.float32)
    gains = _gains(rng, len(flat[f"{norm}/scale"]), strength)
    for name in ("scale", "bias"):
        flat[f"{norm}/{name}"] = flat[f"{norm}/{name}"] * gains
    _divide_inputs(flat, layer, gains)


def _spread_hidden(flat: dict[str, Any], first: str, second: str, strength: float, seed: int) -> None:
    """Gains on the channels between two linears with a ReLU, drawn by the path of the MLP that they make."""
    gains = _gains(_generator(first.rpartition("/")[0], seed), len(flat[f"{first}/bias"]), strength)
    for name in ("kernel", "bias"):
        flat[f"{first}/{name}"] = flat[f"{first}/{name}"] * gains
    _divide_inputs(flat, second, gains)


def _part_keys(flat: dict[str, Any], layer: str, strength: float, seed: int) -> None:
    """A constant on every key channel, upwards on half of them and downwards on the others."""
    channels = len(flat[f"{layer}/bias"])
    signs = np.where(_generator(layer, seed).permutation(channels) % 2, 1.0, -1.0)
    # Inputs are of norms, or about as large: a key channel deviates by about the length of its column.
    deviation = np.sqrt(np.mean(np.sum(np.square(flat[f"{layer}/kernel"]), axis=0)))
    flat[f"{layer}/bias"] = (flat[f"{layer}/bias"] + strength * _KEY * deviation * signs).astype(np.float32)


def _make(argument: str) -> Transform:
    try:
        strength = float(argument or 1)
    except ValueError:
        raise InputError(f"The transform harder:{argument} needs a number as its strength, as in harder:1.") from None
    _check_strength(strength)

    def apply(params: Params, context: Context) -> Params:
        return rewrite(params, context.architecture.rewritable(context.sam), strength)

    return Transform(f"harder:{strength:g}", apply)


register("harder", _make)
