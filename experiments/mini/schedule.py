"""Phases, rates and the optimiser, and one compiled step of each phase."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.mini.atlas import Atlas
from experiments.mini.augment import BatchSettings, make_batch
from experiments.mini.losses import LossWeights, joint_loss, pretrain_loss
from experiments.mini.teacher import Teacher
from sam_flax.sam import Params
from sam_flax.segmenter import Segmenter


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Lengths in steps and peak learning rates.

    `pretrain` teaches encoder and upscaling to tell objects apart densely, `warm` teaches the decoder on features that
    rest, `joint` trains everything. `joint_steps` is no part of a compiled step, so that its length costs nothing.
    """

    pretrain_steps: int = 600
    warm_steps: int = 150
    joint_steps: int = 6000
    encoder_rate: float = 1e-3
    decoder_rate: float = 1e-3
    pretrain_rate: float = 1e-3
    ramp: int = 100  # steps from nothing to the peak, at the start of each phase
    constant_share: float = 0.3  # first part of the joint phase, before the rates fall to zero
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.999
    frozen_encoder: bool = False  # then the image encoder keeps its weights, and a step costs half

    @property
    def joint_start(self) -> int:
        return self.pretrain_steps + self.warm_steps

    @property
    def total(self) -> int:
        return self.joint_start + self.joint_steps

    def phase(self, step: int) -> str:
        """The phase of a step: "pretrain", "warm" or "joint"."""
        if step < self.pretrain_steps:
            return "pretrain"
        return "warm" if step < self.joint_start else "joint"

    def rates(self, step: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rates of the image encoder and of the rest; `total` is the number of the last step."""
        left = (total - step) / jnp.maximum(1.0, (1 - self.constant_share) * (total - self.joint_start))
        joint = self._ramp(step - self.joint_start) * jnp.clip(left, 0.0, 1.0)
        early = self.pretrain_rate * self._ramp(step)
        pretraining, joined = step < self.pretrain_steps, step >= self.joint_start
        warm = self.decoder_rate * self._ramp(step - self.pretrain_steps)
        encoder = jnp.where(pretraining, early, jnp.where(joined, joint * self.encoder_rate, 0.0))
        encoder = jnp.where(self.frozen_encoder, 0.0, encoder)
        decoder = jnp.where(pretraining, early, jnp.where(joined, joint * self.decoder_rate, warm))
        return encoder, decoder

    def _ramp(self, step: jax.Array) -> jax.Array:
        return jnp.clip((step + 1) / self.ramp, 0.0, 1.0)


class TrainState(NamedTuple):
    step: jax.Array
    params: Params
    ema: Params
    moments: Any


def start_state(params: Params, schedule: Schedule) -> TrainState:
    """The state before the first step."""
    return TrainState(
        jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), _direction(schedule).init(params)
    )


def _direction(schedule: Schedule) -> optax.GradientTransformation:
    """AdamW without its rate; kernels alone decay, and the Fourier matrix, a buffer in SAM, stays."""
    return optax.chain(
        optax.clip_by_global_norm(schedule.clip),
        optax.scale_by_adam(b1=0.9, b2=0.98),
        optax.add_decayed_weights(schedule.weight_decay, _named("kernel")),
        optax.masked(optax.set_to_zero(), _named("positional_encoding_gaussian_matrix")),
    )


def _named(name: str) -> Callable[[Params], Params]:
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == name, params)


Step = Callable[
    [TrainState, jax.Array, jax.Array, Atlas, jax.Array, Params | None], tuple[TrainState, dict[str, jax.Array]]
]


def make_step(
    sam: Segmenter,
    schedule: Schedule,
    settings: BatchSettings,
    weights: LossWeights,
    phase: str,
    precision: jnp.dtype,
    teacher: Segmenter | None = None,
) -> Step:
    """One jitted optimisation step: (state, key, total, atlas, cumulative weights, taught) -> state, metrics.

    `taught` are the parameters of the module `teacher`, or None where there is no teacher.

    The batch is drawn by the key and the state's step alone.
    """
    direction = _direction(schedule)

    def loss(
        params: Params, key: jax.Array, atlas: Atlas, cumulative: jax.Array, taught: Params | None
    ) -> tuple[jax.Array, dict]:
        batch_key, click_key = jax.random.split(key)
        batch = make_batch(batch_key, atlas, cumulative, settings)
        by = None if teacher is None or taught is None else Teacher(teacher, taught)
        if phase == "pretrain":
            return pretrain_loss(sam, params, batch, precision, by)
        return joint_loss(sam, params, batch, click_key, weights, precision, schedule.frozen_encoder, by)

    @partial(jax.jit, donate_argnums=0)
    def step(
        state: TrainState,
        key: jax.Array,
        total: jax.Array,
        atlas: Atlas,
        cumulative: jax.Array,
        taught: Params | None = None,
    ) -> Any:
        gradient = jax.grad(loss, has_aux=True)
        grads, metrics = gradient(state.params, jax.random.fold_in(key, state.step), atlas, cumulative, taught)
        metrics["gradient"] = optax.global_norm(grads)
        updates, moments = direction.update(grads, state.moments, state.params)
        encoder, decoder = schedule.rates(state.step, total)
        params = {
            k: _descend(v, updates[k], encoder if k == "image_encoder" else decoder) for k, v in state.params.items()
        }
        # The average follows closely at first, so that early evaluations mean something.
        decay = jnp.minimum(schedule.ema, (1 + state.step) / (20 + state.step))
        ema = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state.ema, params)
        return TrainState(state.step + 1, params, ema, moments), metrics

    return step


def _descend(params: Params, direction: Params, rate: jax.Array) -> Params:
    return jax.tree.map(lambda p, d: p - rate * d, params, direction)
