"""Learning the rounding and the scales of one unit: start, iterations, end. Pure functions.

QDrop (arXiv 2203.05740) with AdaRound weights, LSQ scales and the progressive grouping of CAG. One compiled function
runs any number of iterations of any unit of a shape: the number of iterations is traced, and groups of channels are
kept in arrays with room for one group per channel.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ahcptq_jax.architectures.base import Operation
from ahcptq_jax.architectures.sites import flatten, intercept_sites, unflatten
from ahcptq_jax.quantizers import Quantizer, Uniform
from ahcptq_jax.quantizers.base import MIN_SCALE, straight_through
from ahcptq_jax.quantizers.kinds import kind_of
from ahcptq_jax.quantizers.weights import QuantizedWeight
from ahcptq_jax.reconstruction import adaround
from ahcptq_jax.reconstruction.config import ReconstructionConfig
from ahcptq_jax.reconstruction.drops import dropping, mix
from ahcptq_jax.reconstruction.objectives import Loss
from sam_flax.layers import in_float32
from sam_flax.sam import Params


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "floors", "weights"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Problem:
    """What stays fixed while a unit is learned; paths are relative to the unit.

    Attributes:
        params: nested parameters, less the kernels whose rounding is learned.
        floors: layer -> `floor(weight / scale)` of those kernels, (..., out).
        weights: layer -> scale and zero point, (out,).
    """

    params: Params
    floors: dict[str, jax.Array]
    weights: dict[str, Uniform]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["rounding", "quantizers", "rounding_moments", "scale_moments"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class State:
    """What is learned, and the optimizers' memory.

    Attributes:
        rounding: layer -> alpha, (..., out).
        quantizers: site -> quantizer; one with groups of channels has room for one per channel.
        rounding_moments: optax state of `rounding`.
        scale_moments: optax state of the quantizers' scales.
    """

    rounding: dict[str, jax.Array]
    quantizers: dict[str, Quantizer]
    rounding_moments: optax.OptState
    scale_moments: optax.OptState


def _optimizers(config: ReconstructionConfig) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    rounding_rate, scale_rate = config.rates()
    schedule = optax.cosine_decay_schedule(scale_rate, max(config.iterations, 1))
    # Adam's moments come first in the second state: `regroup` maps them.
    scales = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(schedule))
    return optax.adam(rounding_rate), scales


def _scales_of(quantizers: Mapping[str, Quantizer]) -> dict[str, dict[str, jax.Array]]:
    return {path: kind_of(q).learned_values(q) for path, q in quantizers.items()}


def _with_scales(quantizers: Mapping[str, Quantizer], scales: Mapping[str, dict[str, Any]]) -> dict[str, Quantizer]:
    return {path: dataclasses.replace(q, **scales.get(path, {})) for path, q in quantizers.items()}


def on_grid(quantizer: Quantizer, grid_bits: int) -> Quantizer:
    """The quantizer on the grid, with gradients to its own scales as if it were itself; itself with `grid_bits` 0.

    Channels that are not grouped yet stay off the grid, whose few multiples of a step are for few groups.
    """
    kind = kind_of(quantizer)
    own = kind.channel_groups
    if not grid_bits or (own is not None and own.count(quantizer) == own.labels(quantizer).shape[0]):
        return quantizer
    snapped = kind.on_grid(jax.lax.stop_gradient(quantizer), grid_bits)
    learned = {name: straight_through(v, getattr(snapped, name)) for name, v in kind.learned_values(quantizer).items()}
    return dataclasses.replace(snapped, **learned)


def with_static_grids(quantizers: Mapping[str, Quantizer], grid_bits: int) -> dict[str, Quantizer]:
    """The quantizers, on the grid where that is a static field of theirs and changes none of their numbers.

    They are so before anything is learned: else every unit that is finished would make another program of the model.
    """
    if not grid_bits:
        return dict(quantizers)
    return {
        path: kind_of(quantizer).on_grid(quantizer, grid_bits) if kind_of(quantizer).static_fields else quantizer
        for path, quantizer in quantizers.items()
    }


def padded(quantizer: Quantizer) -> Quantizer:
    """The quantizer as the compiled step takes it: room for one group per channel, leaves of plain types."""
    groups = kind_of(quantizer).channel_groups
    if groups is not None:
        quantizer = groups.padded(quantizer)
    # Copies, since the step reuses the memory of its arguments.
    return jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf)), quantizer)


def start(
    params: Params,
    weights: Mapping[str, QuantizedWeight],
    quantizers: Mapping[str, Quantizer],
    config: ReconstructionConfig,
) -> tuple[Problem, State]:
    """A unit ready to be learned.

    Args:
        params: its floating-point parameters, kernels included.
        weights: its layers' calibrated weights, whose scales and zero points are kept.
        quantizers: its sites' calibrated quantizers.
    """
    flat = flatten(params)
    floors, alphas, uniform = {}, {}, {}
    for layer, weight in weights.items():
        path = f"{layer}/kernel"
        if not config.learn_rounding:
            flat[path] = weight.decode()
            continue
        kernel = jnp.asarray(flat.pop(path), jnp.float32)
        uniform[layer] = Uniform(jnp.asarray(weight.scale), jnp.asarray(weight.zero_point), weight.bits)
        floors[layer] = jnp.floor(kernel / weight.scale)
        alphas[layer] = adaround.initial_alpha(kernel, weight.scale)
    rooms = {path: padded(q) for path, q in quantizers.items()}
    rounding, scales = _optimizers(config)
    learned = _scales_of(rooms) if config.learn_scales else {}
    return Problem(unflatten(flat), floors, uniform), State(alphas, rooms, rounding.init(alphas), scales.init(learned))


# Of an iteration: the reconstruction loss, and the weighted regularizer.
Losses = jax.Array  # (2,)


@dataclasses.dataclass(frozen=True)
class Learning:
    """What an iteration runs, and how it learns. Hashable: a static argument of the compiled step.

    Attributes:
        operation: the unit.
        loss: of its output.
        config: how to learn.
        grid_bits: not 0 puts the quantizers on a grid of so many bits in every forward; what is learned stays off it.
    """

    operation: Operation
    loss: Loss
    config: ReconstructionConfig
    grid_bits: int = 0


def total(
    problem: Problem,
    rounding: dict,
    scales: dict,
    quantizers: dict,
    batch: Any,
    seeds: jax.Array,
    step: jax.Array,
    shared: Any,
    how: Learning,
) -> tuple[jax.Array, Losses]:
    """What an iteration minimises on its batch, and its two parts.

    Args:
        batch: as the rows of `advance`'s store, (b, ...).
        seeds: (inputs + quantizers, 2), of its drops.
    """
    config = how.config
    inputs, original, target, context = batch
    mixed = zip(seeds[: len(inputs)], inputs, original, strict=True)
    args = [mix(seed, q, o, config.input_drop) for seed, q, o in mixed]
    kernels = {
        f"{layer}/kernel": adaround.soft_weight(problem.floors[layer], alpha, problem.weights[layer])
        for layer, alpha in rounding.items()
    }
    params = unflatten(flatten(problem.params) | kernels)
    current = {path: on_grid(q, how.grid_bits) for path, q in _with_scales(quantizers, scales).items()}
    handler = dropping(current, seeds[len(inputs) :], config.activation_drop)
    with intercept_sites(handler):
        output = how.operation(params, *args)
    error = how.loss(output, target, context, shared)
    done = step + 1
    beta = adaround.temperature(done, config.iterations, config.warmup, config.beta_start, config.beta_end)
    warm = done >= config.warmup * config.iterations
    penalty = sum((jnp.sum(adaround.regularizer(a, beta)) for a in rounding.values()), jnp.float32(0))
    penalty = jnp.where(warm, config.rounding_weight * penalty, 0.0)
    return error + penalty, jnp.stack([error, penalty])


def seeds(key: jax.Array, step: jax.Array, *shape: int) -> jax.Array:
    """Seeds (*shape, 2) of an iteration's drops."""
    return jax.random.bits(jax.random.fold_in(key, step), (*shape, 2), jnp.uint32)


def learned(state: State, config: ReconstructionConfig) -> tuple[dict, dict]:
    """What has gradients: the rounding, and the scales."""
    return state.rounding, _scales_of(state.quantizers) if config.learn_scales else {}


def stepped(state: State, gradients: tuple[dict, dict], config: ReconstructionConfig) -> State:
    """The state after a step of both optimizers."""
    rounding_optimizer, scale_optimizer = _optimizers(config)
    _, scales = learned(state, config)
    updates, rounding_moments = rounding_optimizer.update(gradients[0], state.rounding_moments)
    rounding = optax.apply_updates(state.rounding, updates)
    updates, scale_moments = scale_optimizer.update(gradients[1], state.scale_moments)
    if config.relative_steps:
        # Scales of a few thousandths and of several units take part alike.
        updates = jax.tree.map(jnp.multiply, updates, scales)
    # As the official code: a scale that crosses zero is reflected.
    scales = jax.tree.map(lambda s: jnp.maximum(jnp.abs(s), MIN_SCALE), optax.apply_updates(scales, updates))
    return State(rounding, _with_scales(state.quantizers, scales), rounding_moments, scale_moments)


@partial(jax.jit, static_argnames="how", donate_argnames="state")
@in_float32
def advance(
    problem: Problem,
    state: State,
    store: Any,
    places: jax.Array,
    first: jax.Array,
    last: jax.Array,
    key: jax.Array,
    shared: Any = (),
    *,
    how: Learning,
) -> tuple[State, Losses]:
    """Iterations `first` to `last - 1` of a unit's reconstruction, with one image each.

    Args:
        store: (quantized inputs, original inputs, target, the loss's context), rows (M, b, ...); see `units.Feeder`.
        places: (chunk,) int32, the row of each iteration, counted from `first`.
        first, last: traced, at most `chunk` apart: stages of any length are one program.
        key: of the unit; iterations derive theirs from it.
        shared: what the loss looks at besides its rows, see `objectives.Objective`.
        how: the unit, and how it is learned.

    Returns:
        The new state, and the mean over the iterations of the losses.
    """

    def of_row(rounding: dict, scales: dict, quantizers: dict, step: jax.Array, row: jax.Array) -> Any:
        batch = jax.tree.map(lambda a: a[row], store)
        drops = seeds(key, step, len(batch[0]) + len(quantizers))
        return total(problem, rounding, scales, quantizers, batch, drops, step, shared, how)

    def iterate(step: jax.Array, carry: tuple[State, Losses]) -> tuple[State, Losses]:
        state, losses = carry
        gradients, parts = jax.grad(of_row, argnums=(0, 1), has_aux=True)(
            *learned(state, how.config), state.quantizers, step, places[step - first]
        )
        return stepped(state, gradients, how.config), losses + parts

    # Not a scan over the chunk: a loop with traced ends needs no second program for a shorter chunk.
    state, losses = jax.lax.fori_loop(first, last, iterate, (state, jnp.zeros(2)))
    return state, losses / jnp.maximum(last - first, 1)


def finish(
    problem: Problem,
    state: State,
    weights: Mapping[str, QuantizedWeight],
    quantizers: Mapping[str, Quantizer],
    groups: int,
    grid_bits: int = 0,
) -> tuple[dict[str, QuantizedWeight], dict[str, Quantizer]]:
    """The unit's integer weights and deterministic quantizers: every layer's rounding is made hard.

    Args:
        weights: what `start` was given; layers whose rounding is not learned keep theirs.
        quantizers: what `start` was given.
        groups: at the end of the ladder; 0 if there was none.
        grid_bits: of the grid that the quantizers end on; 0 for none.
    """
    found = dict(weights)
    for layer, alpha in state.rounding.items():
        uniform = problem.weights[layer]
        codes = adaround.hard_codes(problem.floors[layer], alpha, uniform)
        found[layer] = QuantizedWeight.from_codes(codes, uniform.scale, uniform.zero_point, uniform.bits)
    trimmed: dict[str, Quantizer] = {}
    for path, quantizer in state.quantizers.items():
        own = kind_of(quantizer).channel_groups
        if own is not None:
            calibrated = own.count(quantizers[path])
            quantizer = own.trimmed(quantizer, min(calibrated, groups) if groups else calibrated)
        trimmed[path] = kind_of(quantizer).on_grid(quantizer, grid_bits) if grid_bits else quantizer
    return found, trimmed
