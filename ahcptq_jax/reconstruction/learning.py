"""Learning the rounding and the scales of one unit: state, step, regrouping. Pure functions.

QDrop (arXiv 2203.05740) with AdaRound weights, LSQ scales and the progressive grouping of CAG. One compiled function
runs any number of iterations of any unit of a shape: the number of iterations is traced, and groups of channels are
kept in arrays with room for one group per channel.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ahcptq_jax.architectures.base import GRANULARITIES, PARTS, Operation
from ahcptq_jax.architectures.sites import flatten, intercept_sites, unflatten
from ahcptq_jax.quantizers import Quantizer, Uniform, fake_quant_lsq
from ahcptq_jax.quantizers.base import MIN_SCALE, straight_through
from ahcptq_jax.quantizers.kinds import kind_of
from ahcptq_jax.quantizers.weights import QuantizedWeight
from ahcptq_jax.reconstruction import adaround
from ahcptq_jax.reconstruction.objectives import Loss
from ahcptq_jax.settings import at_least, between, check_settings, finite_from, setting
from sam_flax.errors import InputError
from sam_flax.layers import in_float32
from sam_flax.sam import Params

# Shares of the iterations after which channels are grouped into 8G, 4G, 2G and G (paper, section on CAG).
REGROUP_AT = (0.2, 0.4, 0.6, 0.8)

PAPER_ITERATIONS = 20000
PAPER_ROUNDING_RATE = 1e-3
PAPER_SCALE_RATE = 4e-5
RELATIVE_SCALE_RATE = 1e-4
MOST_SCALE_RATE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Switches and numbers of the reconstruction; the defaults are the paper's but for the steps of the scales.

    Learning rates that are not given depend on the number of iterations, so that few of them travel as far as the
    paper's 20000. Its rounding rate grows by the square root of how many times fewer there are (noisy gradients, whose
    steps add up like a random walk), its scale rate in proportion (scales move one way). A scale's step is relative to
    the scale by default, where 1e-4 takes the place of the paper's 4e-5, which is 1e-4 of a scale of 0.4: on MINI at
    200 iterations masks agree more with floating point than with absolute steps of any size that was tried.
    200 iterations: 1e-2 and 1e-2.

    Raises:
        InputError: if a number is out of its range, or the switches contradict each other.
    """

    iterations: int = setting(PAPER_ITERATIONS, "Iterations for each unit.", check=at_least(0))
    batch: int = setting(1, "Images per iteration.", check=at_least(1))
    learn_rounding: bool = setting(True, "AdaRound; else weights stay rounded to nearest.")
    learn_scales: bool = setting(True, "Learn the scales of activations (LSQ).")
    rounding_rate: float | None = setting(
        None, "Learning rate of the rounding, constant; default: by the iterations.", type=float, check=finite_from(0)
    )
    scale_rate: float | None = setting(
        None,
        "Learning rate of activation scales, with cosine decay to 0; default: by the iterations.",
        type=float,
        check=finite_from(0),
    )
    relative_steps: bool = setting(True, "Steps of scales in proportion to the scale; the official ones are absolute.")
    input_drop: float = setting(
        0.5, "QDrop: share of a unit's input that is taken from the floating-point model.", check=between(0, 1)
    )
    activation_drop: float = setting(
        0.5, "QDrop: share of every activation inside a unit that passes unquantized.", check=between(0, 1)
    )
    granularity: str = setting(
        "part", "What is learned together in the encoder: parts of blocks, or blocks whole.", choices=GRANULARITIES
    )
    objective: str = setting("local", "What a unit's learning minimises; see `reconstruction.objectives`.")
    loss_power: float = setting(2.0, "Power of the errors of a unit's output; the paper's is 2.", check=finite_from(1))
    rounding_weight: float = setting(0.01, "Weight of the regularizer, once warm.", check=finite_from(0))
    warmup: float = setting(0.2, "Share of the iterations without regularizer.", check=between(0, 1))
    beta_start: float = setting(20.0, "The regularizer's exponent after the warm-up, from where it falls linearly.")
    beta_end: float = setting(2.0, "The regularizer's exponent at the end.")
    parts: tuple[str, ...] = setting(PARTS, "What is reconstructed; the rest keeps its calibration.", sweep=False)
    seed: int = setting(0, "Seed of batches and drops.", check=at_least(0), sweep=False)
    # What follows has no influence on the result.
    chunk: int = setting(50, "Iterations per call of the compiled function.", check=at_least(1), sweep=False)
    memory_budget: int = setting(
        4 * 2**30,
        "Bytes of cached inputs and outputs held in memory; more go to disk.",
        check=at_least(0),
        sweep=False,
    )
    save_seconds: float = setting(300.0, "Seconds between saves inside a unit.", check=finite_from(0), sweep=False)

    def __post_init__(self) -> None:
        check_settings(self)
        if not 1 <= self.beta_end <= self.beta_start:
            raise InputError(f"beta_start={self.beta_start} and beta_end={self.beta_end} must fall, to 1 at least.")
        if unknown := sorted(set(self.parts) - set(PARTS)):
            raise InputError(f"parts has {unknown[0]!r}; choose of {', '.join(PARTS)}.")
        halves, chosen = {"encoder_attention", "encoder_mlp"}, set(self.parts)
        asked, made = (halves, {"encoder_block"}) if self.granularity == "block" else ({"encoder_block"}, halves)
        if asked & chosen and not made & chosen:
            raise InputError(
                f"parts={self.parts} and granularity={self.granularity!r} leave the encoder's blocks as they are; name "
                f"{' or '.join(sorted(made))} among the parts."
            )

    def rates(self) -> tuple[float, float]:
        """Learning rates of rounding and of scales."""
        fewer = PAPER_ITERATIONS / max(self.iterations, 1)
        rounding = PAPER_ROUNDING_RATE * math.sqrt(fewer) if self.rounding_rate is None else self.rounding_rate
        if self.scale_rate is not None:
            return rounding, self.scale_rate
        return rounding, min(
            (RELATIVE_SCALE_RATE if self.relative_steps else PAPER_SCALE_RATE) * fewer, MOST_SCALE_RATE
        )

    def result_settings(self) -> "ReconstructionConfig":
        """Itself with defaults for what has no influence on the result; equal settings give equal results."""
        default = ReconstructionConfig()
        same = {name: getattr(default, name) for name in ("chunk", "memory_budget", "save_seconds")}
        return dataclasses.replace(self, **same)

    def regroup_steps(self) -> tuple[int, ...]:
        """The iteration before which each rung of the ladder is taken."""
        return tuple(int(share * self.iterations) for share in REGROUP_AT)


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


Seed = jax.Array  # (2,) uint32


def _random_words(seed: Seed, shape: tuple[int, ...]) -> jax.Array:
    """uint32 words of `shape`: a hash of (seed, position), which is all that drops need.

    JAX's own generators write their words to memory first; this one is fused into its use, and costs a fifth.
    """
    position = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    # The multipliers and shifts of C. Wellons' "lowbias32" (public domain), after a Weyl step.
    word = position * jnp.uint32(0x9E3779B9) + seed[0]
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D) ^ seed[1]
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)


def _mix(seed: Seed, value: jax.Array, instead: jax.Array, share: float) -> jax.Array:
    """`value` with about `share` of its elements taken from `instead`."""
    if share in (0, 1):
        return instead if share else value
    return jnp.where(_random_words(seed, value.shape) < jnp.uint32(share * 2**32), instead, value)


def _dropping(quantizers: Mapping[str, Quantizer], seeds: jax.Array, share: float) -> Any:
    """A site handler: quantizes, with LSQ's gradients, all but a random `share` of the elements.

    LSQ's factor takes the size of what passes at once: of an attention map that comes in pieces, a piece's. Adam does
    not see the difference, but for its epsilon.

    Args:
        seeds: (sites, 2), for the sites in alphabetical order.
    """
    numbers = {path: i for i, path in enumerate(sorted(quantizers))}

    def handle(path: str, value: Any) -> Any:
        if path not in quantizers or share == 1:
            return value
        seed = seeds[numbers[path]]
        if path.endswith("softmax"):
            # A large attention map comes here in pieces, in a loop traced once: their content tells them apart.
            content = jnp.sum(jax.lax.stop_gradient(value[..., 0]))
            seed = seed ^ jax.lax.bitcast_convert_type(content, jnp.uint32)
        return _mix(seed, fake_quant_lsq(quantizers[path], value), value, share)

    return handle


def _merge_rows(a: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows (B,) of (M, b, ...) as one batch (B*b, ...)."""
    return a[rows].reshape(-1, *a.shape[2:])


@partial(jax.jit, static_argnames=("operation", "loss", "config", "grid_bits"), donate_argnames="state")
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
    operation: Operation,
    loss: Loss,
    config: ReconstructionConfig,
    grid_bits: int = 0,
) -> tuple[State, jax.Array]:
    """Iterations `first` to `last - 1` of a unit's reconstruction.

    Args:
        store: (quantized inputs, original inputs, target, the loss's context), rows (M, b, ...); see `units.Feeder`.
        places: (chunk, batch) int32, the rows of each iteration, counted from `first`.
        first, last: traced, at most `chunk` apart: stages of any length are one program.
        key: of the unit; iterations derive theirs from it.
        shared: what the loss looks at besides its rows, see `objectives.Objective`.
        operation: the unit.
        loss: of its output.
        config: how to learn.
        grid_bits: not 0 puts the quantizers on a grid of so many bits in every forward; what is learned stays off it.

    Returns:
        The new state, and the mean over the iterations of the reconstruction loss and of the weighted regularizer.
    """
    rounding_optimizer, scale_optimizer = _optimizers(config)

    def total(
        rounding: dict, scales: dict, quantizers: dict, step: jax.Array, rows: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        inputs, original, target, context = jax.tree.map(lambda a: _merge_rows(a, rows), store)
        seeds = jax.random.bits(jax.random.fold_in(key, step), (len(inputs) + len(quantizers), 2), jnp.uint32)
        mixed = zip(seeds[: len(inputs)], inputs, original, strict=True)
        args = [_mix(seed, q, o, config.input_drop) for seed, q, o in mixed]
        kernels = {
            f"{layer}/kernel": adaround.soft_weight(problem.floors[layer], alpha, problem.weights[layer])
            for layer, alpha in rounding.items()
        }
        params = unflatten(flatten(problem.params) | kernels)
        current = {path: on_grid(q, grid_bits) for path, q in _with_scales(quantizers, scales).items()}
        handler = _dropping(current, seeds[len(inputs) :], config.activation_drop)
        with intercept_sites(handler):
            output = operation(params, *args)
        error = loss(output, target, context, shared)
        done = step + 1
        beta = adaround.temperature(done, config.iterations, config.warmup, config.beta_start, config.beta_end)
        warm = done >= config.warmup * config.iterations
        penalty = sum((jnp.sum(adaround.regularizer(a, beta)) for a in rounding.values()), jnp.float32(0))
        penalty = jnp.where(warm, config.rounding_weight * penalty, 0.0)
        return error + penalty, jnp.stack([error, penalty])

    def iterate(step: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        state, losses = carry
        scales = _scales_of(state.quantizers) if config.learn_scales else {}
        gradients, parts = jax.grad(total, argnums=(0, 1), has_aux=True)(
            state.rounding, scales, state.quantizers, step, places[step - first]
        )
        updates, rounding_moments = rounding_optimizer.update(gradients[0], state.rounding_moments)
        rounding = optax.apply_updates(state.rounding, updates)
        updates, scale_moments = scale_optimizer.update(gradients[1], state.scale_moments)
        if config.relative_steps:
            # Scales of a few thousandths and of several units take part alike.
            updates = jax.tree.map(jnp.multiply, updates, scales)
        # As the official code: a scale that crosses zero is reflected.
        scales = jax.tree.map(lambda s: jnp.maximum(jnp.abs(s), MIN_SCALE), optax.apply_updates(scales, updates))
        quantizers = _with_scales(state.quantizers, scales)
        return State(rounding, quantizers, rounding_moments, scale_moments), losses + parts

    # Not a scan over the chunk: a loop with traced ends needs no second program for a shorter chunk.
    state, losses = jax.lax.fori_loop(first, last, iterate, (state, jnp.zeros(2)))
    return state, losses / jnp.maximum(last - first, 1)


def regroup(state: State, groups: int, final: int, metric: str) -> State:
    """One rung of CAG's ladder: the channels of every quantizer with groups into `groups`, moments included.

    Args:
        final: groups at the end of the ladder.
        metric: of the k-means, see `grouping.group_channels`.
    """
    quantizers = dict(state.quantizers)
    adam, *rest = state.scale_moments
    for path, quantizer in state.quantizers.items():
        own = kind_of(quantizer).channel_groups
        if own is None or groups >= own.labels(quantizer).shape[0]:
            continue
        quantizers[path] = merged = own.merged(quantizer, groups, final, metric)
        if path in adam.mu:
            pairs = {
                name: _map_moments(mean, adam.nu[path][name], own.labels(quantizer), own.labels(merged))
                for name, mean in adam.mu[path].items()
            }
            adam = adam._replace(
                mu=adam.mu | {path: {name: mean for name, (mean, _) in pairs.items()}},
                nu=adam.nu | {path: {name: square for name, (_, square) in pairs.items()}},
            )
    return dataclasses.replace(state, quantizers=quantizers, scale_moments=(adam, *rest))


@jax.jit
def _map_moments(mu: jax.Array, nu: jax.Array, old: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adam's moments (C,) of groups labelled `old` (C,), for the groups `new` (C,) that they were merged into.

    The gradient of a merged scale is the sum of those it replaces, and so is its mean. Its root mean square is at most
    the sum of theirs; that bound is taken, so that no step grows by merging.
    """
    share = 1.0 / jnp.zeros_like(mu).at[old].add(1.0)[old]  # each old group counts once, over its channels
    merged = jnp.zeros_like(mu).at[new].add(mu[old] * share)
    root = jnp.zeros_like(nu).at[new].add(jnp.sqrt(nu[old]) * share)
    return merged, jnp.square(root)


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
