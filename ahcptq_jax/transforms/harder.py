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

Two further ways are taken by name alone, for what SAM-B is known to break on:

  * "far": queries and keys of the decoder that reach 170 and more on the channels that decide least: a channel of the
    queries times g, the same of the keys divided by g, or the other way round.
  * "conditioned": the first linear behind every norm with a condition number of 300 and more, by gains of the norm.

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
_FAR = 170.0  # largest query or key of a far channel, at strength 1
_FAR_CHANNELS = 8  # one in so many of an attention's channels is far
_CONDITION = 300.0  # of a conditioned linear, at strength 1

# What is made harder: uneven channels and bimodal keys, as above, or one of these alone.
WAYS = ("all", "channels", "bimodal", "far", "conditioned")


def make_harder(params: Params, config: Any, strength: float, seed: int = 0, way: str = "all") -> Params:
    """Parameters of the same function with uneven channels and bimodal keys, or made harder in another way.

    Args:
        params: the model's.
        config: the model's.
        strength: 0 changes nothing; 1 spreads gains over about two octaves each way. At most 4.
        seed: decides gains, offsets and signs.
        way: one of `WAYS`.

    Raises:
        InputError: if the strength is out of range, or the way unknown.
    """
    sam = module_of(config)
    return rewrite(params, architecture_of(sam).rewritable(sam), strength, seed, way)


def rewrite(params: Params, places: Rewritable, strength: float, seed: int = 0, way: str = "all") -> Params:
    """`make_harder` at the given places of a model."""
    _check_strength(strength)
    if way not in WAYS:
        raise InputError(f"A model is made harder in one of the ways {', '.join(WAYS)}, not {way!r}.")
    if strength == 0:
        return params
    flat: dict[str, Any] = {path: np.asarray(value, np.float32) for path, value in flatten(params).items()}
    if way in ("all", "channels"):
        for norm, layer, offsets in places.norms:
            _spread_norm(flat, norm, layer, strength, seed, offsets=offsets)
        for first, second in places.hidden:
            _spread_hidden(flat, first, second, strength, seed)
    if way in ("all", "bimodal"):
        for layer in places.keys:
            _part_keys(flat, layer, strength, seed)
    if way == "far":
        for attention in places.scores:
            _trade_scores(flat, attention, strength, seed)
    if way == "conditioned":
        for norm, layer, _ in places.norms:
            _condition(flat, norm, layer, strength, seed)
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


def _reach(flat: dict[str, Any], layer: str) -> np.ndarray:
    """About the largest value of each output channel: inputs are of norms, or about as large."""
    length = np.sqrt(np.sum(np.square(flat[f"{layer}/kernel"]), axis=0))
    return np.maximum(3 * length + np.abs(flat[f"{layer}/bias"]), 1e-6)


def _trade_scores(flat: dict[str, Any], attention: str, strength: float, seed: int) -> None:
    """Far queries on one half of the least deciding channels, far keys on the other."""
    layers = f"{attention}/q_proj", f"{attention}/k_proj"
    reach = [_reach(flat, layer) for layer in layers]
    least = np.argsort(reach[0] * reach[1])[: max(2, len(reach[0]) // _FAR_CHANNELS)]
    least = _generator(attention, seed).permutation(least)
    for index, channel in enumerate(least):
        far, other = (0, 1) if index % 2 else (1, 0)
        gain = np.exp2(np.ceil(np.log2(max(strength * _FAR / reach[far][channel], 1.0)))).astype(np.float32)
        for which, factor in ((far, gain), (other, 1 / gain)):
            flat[f"{layers[which]}/kernel"] = flat[f"{layers[which]}/kernel"].copy()
            flat[f"{layers[which]}/bias"] = flat[f"{layers[which]}/bias"].copy()
            flat[f"{layers[which]}/kernel"][:, channel] *= factor
            flat[f"{layers[which]}/bias"][channel] *= factor


def _condition(flat: dict[str, Any], norm: str, layer: str, strength: float, seed: int) -> None:
    """Gains of a norm, even in octaves, so wide that the kernel behind it has the wanted condition number."""
    channels, wanted = len(flat[f"{norm}/scale"]), _CONDITION * strength
    places = _generator(norm, seed).permutation(channels) / max(channels - 1, 1) - 0.5
    kernel = flat[f"{layer}/kernel"].reshape(-1, channels, flat[f"{layer}/kernel"].shape[-1])
    for octaves in range(25):
        gains = np.exp2(np.round(octaves * places)).astype(np.float32)
        if octaves == 24 or min(np.linalg.cond(part / gains[:, None]) for part in kernel) >= wanted:
            break
    for name in ("scale", "bias"):
        flat[f"{norm}/{name}"] = flat[f"{norm}/{name}"] * gains
    _divide_inputs(flat, layer, gains)


def _make(argument: str) -> Transform:
    number, _, way = argument.partition(",")
    try:
        strength = float(number or 1)
    except ValueError:
        raise InputError(f"The transform harder:{argument} needs a number as its strength, as in harder:1.") from None
    _check_strength(strength)
    if way and way not in WAYS:
        raise InputError(f"The transform harder:{argument} must end in one of {', '.join(WAYS)}, as in harder:1,far.")

    def apply(params: Params, context: Context) -> Params:
        return rewrite(params, context.architecture.rewritable(context.sam), strength, way=way or "all")

    return Transform(f"harder:{strength:g}" + (f",{way}" if way else ""), apply)


register("harder", _make)
