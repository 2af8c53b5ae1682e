"""PCC: ranges of the decoder's queries and keys that keep what each token attends to (SAQ-SAM, arXiv 2503.06515).

Some queries and keys reach far beyond what decides: in SAM-B's decoder to 170, where all that matters lies within
about 1. A range by the error of values keeps the far ones and loses the rest. Here a range is judged by the attention
map: what a row attends to is where it exceeds half of its largest value, and the range is best whose maps share most of
that with the floating-point model's.

The released program searches each attention on what the clipped ones before it give; here every one is searched on what
the floating-point model gives it.
"""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from ahcptq_jax.architectures import Architecture
from ahcptq_jax.architectures.sites import flatten, intercept_sites
from ahcptq_jax.quantizers import Quantizer, Uniform
from ahcptq_jax.quantizers.base import qparams_from_range
from ahcptq_jax.quantizers.kinds import kind_of
from ahcptq_jax.recipe import FOCUSED, Recipe
from sam_flax.layers import in_float32
from sam_flax.sam import Params, call

# Shares of the values at or below the upper end of a range, as many lying at or above its lower end: the released
# program's. The tightest first: of equally good ranges the first is taken.
PERCENTILES = (
    *(0.85, 0.87, 0.88, 0.89, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95),
    *(0.96, 0.965, 0.97, 0.975, 0.98, 0.983, 0.985, 0.987, 0.989, 0.99),
    *(0.993, 0.995, 0.997, 0.999, 0.9993, 0.9995, 0.9997, 0.9999, 0.99999),
)
SWEEPS = 2


class Attention(NamedTuple):
    """What one attention of the decoder sees for one image, and its two projections.

    Attributes:
        inputs: of the projections of queries and of keys, (P, T, C) and (P, N, C).
        kernels, biases: of the two projections.
        heads: of the attention, as an array of that many entries.
    """

    inputs: tuple[jax.Array, jax.Array]
    kernels: tuple[jax.Array, jax.Array]
    biases: tuple[jax.Array, jax.Array]
    heads: jax.Array


class Choices(NamedTuple):
    """The ranges of the four sites in the order of the search: both projections' inputs, queries, keys.

    Attributes:
        scales, zero_points: (4,).
        on: (4,) whether a site is quantized.
    """

    scales: jax.Array
    zero_points: jax.Array
    on: jax.Array


def focus(probabilities: Float[Array, "*g t n"]) -> Bool[Array, "*g t n"]:
    """Where each row of an attention map exceeds half of its largest value."""
    return probabilities > 0.5 * jnp.max(probabilities, axis=-1, keepdims=True)


def focus_loss(mask: Bool[Array, "p h t n"], reference: Bool[Array, "p h t n"]) -> Float[Array, ""]:
    """The mean over prompts and heads of 1 - IoU of two focus masks."""
    shared = jnp.sum(mask & reference, axis=(-2, -1))
    either = jnp.sum(mask | reference, axis=(-2, -1))
    return jnp.mean(1.0 - shared / either)


def percentile_ranges(values: Float[Array, "..."]) -> tuple[Float[Array, " p"], Float[Array, " p"]]:
    """The lower and upper ends of the ranges that `PERCENTILES` name, between neighbouring values by proportion."""
    ordered = jnp.sort(values.reshape(-1))

    def quantile(shares: np.ndarray) -> jax.Array:
        # In double precision on the host: a position among ten million is no float32.
        place = shares * (ordered.size - 1)
        below = np.floor(place).astype(np.int32)
        above = np.minimum(below + 1, ordered.size - 1)
        part = jnp.asarray(place - below, jnp.float32)
        return ordered[below] + part * (ordered[above] - ordered[below])

    shares = np.array(PERCENTILES)
    return quantile(1.0 - shares), quantile(shares)


@partial(jax.jit, static_argnames=("architecture", "levels"))
@in_float32
def _map(architecture: Architecture, attention: Attention, choices: Choices, levels: tuple[int, ...]) -> jax.Array:
    """The focus mask of an attention with the given quantizers."""

    def rounded(x: jax.Array, site: int) -> jax.Array:
        scale, zero = choices.scales[site], choices.zero_points[site]
        value = (jnp.clip(jnp.round(x / scale) + zero, 0, levels[site]) - zero) * scale
        return jnp.where(choices.on[site], value, x)

    def project(index: int) -> jax.Array:
        y = rounded(attention.inputs[index], index) @ attention.kernels[index] + attention.biases[index]
        heads = len(attention.heads)
        return y.reshape(*y.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    q, k = rounded(project(0), 2), rounded(project(1), 3)
    return focus(architecture.attention_map(q * q.shape[-1] ** -0.5, k))


def search_ranges(architecture: Architecture, attention: Attention, bits: tuple[int, ...]) -> list[Uniform]:
    """The quantizers of the four sites of an attention; see `Choices` for their order.

    Args:
        architecture: says how attention maps are made.
        attention: what it sees.
        bits: widths of the four sites.
    """
    levels = tuple(2**width - 1 for width in bits)
    choices = Choices(jnp.ones(4), jnp.zeros(4), jnp.zeros(4, bool))
    reference = _map(architecture, attention, choices, levels)
    values = [*attention.inputs]
    for index in (0, 1):
        values.append(attention.inputs[index] @ attention.kernels[index] + attention.biases[index])
    ranges = [percentile_ranges(x) for x in values]
    for _ in range(SWEEPS):
        for site in range(4):
            scales, zeros = qparams_from_range(*ranges[site], bits[site])
            tried = [
                Choices(
                    choices.scales.at[site].set(scale),
                    choices.zero_points.at[site].set(zero),
                    choices.on.at[site].set(True),
                )
                for scale, zero in zip(scales, zeros, strict=True)
            ]
            losses = [float(focus_loss(_map(architecture, attention, c, levels), reference)) for c in tried]
            choices = tried[int(np.argmin(losses))]
    return [Uniform(choices.scales[i], choices.zero_points[i], bits[i]) for i in range(4)]


def clip_by_focus(
    architecture: Architecture,
    sam: Any,
    params: Params,
    embedding: Any,
    boxes: Float32[np.ndarray, "p 4"],
    recipe: Recipe,
) -> dict[str, Quantizer]:
    """The quantizers of the queries, keys and their projections' inputs in all attentions of the decoder.

    Args:
        architecture: the model's; its `focused` names the attentions.
        sam: the module.
        params: its floating-point parameters.
        embedding: the encoder's output for one image.
        boxes: its prompts, in canvas pixels.
        recipe: says the widths; sites that it leaves in floating point stay so.
    """
    if architecture.focused is None:
        return {}
    pattern = re.compile(architecture.focused)
    decoder = architecture.decoder(params)

    @jax.jit
    @in_float32
    def run(params: Params, embedding: Any, boxes: jax.Array) -> dict[str, jax.Array]:
        captured: dict[str, jax.Array] = {}

        def keep(path: str, value: Any) -> Any:
            if any(path.endswith(f"/{leaf}") and pattern.fullmatch(path.removesuffix(f"/{leaf}")) for leaf in FOCUSED):
                captured[path] = value
            return value

        with intercept_sites(keep):
            call(sam, params, embedding, None, boxes, method="decode")
        return captured

    seen = run(decoder, jax.tree.map(jnp.asarray, embedding), jnp.asarray(boxes))
    flat, found = flatten(params), {}
    for path in sorted({p.removesuffix("/q_proj/input") for p in seen if p.endswith("/q_proj/input")}):
        layers = [f"{path}/{name}_proj" for name in "qk"]
        attention = Attention(
            tuple(seen[f"{layer}/input"] for layer in layers),  # type: ignore[arg-type]
            tuple(jnp.asarray(flat[f"{layer}/kernel"]) for layer in layers),  # type: ignore[arg-type]
            tuple(jnp.asarray(flat[f"{layer}/bias"]) for layer in layers),  # type: ignore[arg-type]
            jnp.zeros(seen[f"{path}/q"].shape[1]),
        )
        sites = [f"{path}/{leaf}" for leaf in FOCUSED]
        recipes = [recipe.at(site) for site in sites]
        bits = tuple(8 if choice is None else choice.a_bits for choice in recipes)
        for site, choice, quantizer in zip(sites, recipes, search_ranges(architecture, attention, bits), strict=True):
            if choice is not None:
                kind, grid_bits = kind_of(quantizer), recipe.grid_bits
                found[site] = kind.on_grid(quantizer, grid_bits) if grid_bits else quantizer
    return found
