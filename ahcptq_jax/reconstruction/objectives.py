"""What a unit's reconstruction minimises, as values: the local error of its output, and whatever is registered here.

An objective is prepared for a unit once. It may look at more than the unit's output and target: at arrays with a row
for each calibration image, such as prompts, and at what all images share, such as the rest of the model's parameters.
A new objective is a file that ends in `register(...)`; `ReconstructionConfig.objective` names it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.architectures import Architecture
from ahcptq_jax.architectures.base import Unit
from sam_flax.errors import InputError
from sam_flax.sam import Params


class Loss(Protocol):
    """A number to minimise. Hashable: a static argument of the compiled step."""

    def __call__(self, output: jax.Array, target: jax.Array, context: tuple[jax.Array, ...], shared: Any) -> jax.Array:
        """The loss of a batch.

        Args:
            output: of the quantized unit, (B*b, ...) for B images of b rows each.
            target: of the floating-point unit, of the same shape.
            context: rows of `Objective.context` for the same images, each (B*b, ...).
            shared: `Objective.shared`.
        """


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss with what it looks at besides output and target.

    Attributes:
        loss: the function.
        context: arrays (N, b, ...) with rows for each of the N calibration images.
        shared: a pytree of arrays that all images share.
    """

    loss: Loss
    context: tuple[np.ndarray, ...] = ()
    shared: Any = ()


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a unit stands, for the objectives that look beyond it.

    Attributes:
        unit: that is learned.
        architecture: of the model.
        sam: the module.
        params: the floating-point parameters, after all transforms.
        boxes: for each calibration image the prompts (P, 4) in canvas pixels.
    """

    unit: Unit
    architecture: Architecture
    sam: Any
    params: Params
    boxes: Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class LocalError:
    """`mean(sum_over_axis(|output - target|^power))`, official `lp_loss`."""

    axis: int
    power: float = 2.0

    def __call__(self, output: jax.Array, target: jax.Array, context: tuple[jax.Array, ...], shared: Any) -> jax.Array:
        del context, shared
        difference = jnp.square(output - target)
        if self.power != 2:
            # The power of a square: its gradient at 0 is a number, once it is kept off 0.
            difference = jnp.power(difference + 1e-12, self.power / 2)
        return jnp.mean(jnp.sum(difference, axis=self.axis))


Make = Callable[[Place, float], Objective]

_OBJECTIVES: dict[str, Make] = {}


def register(name: str, make: Make) -> None:
    """Makes an objective known; `make` takes a unit's place and `ReconstructionConfig.loss_power`."""
    _OBJECTIVES[name] = make


def objective_named(name: str) -> Make:
    """What prepares the objective that a configuration names.

    Raises:
        InputError: if there is none of this name.
    """
    if name not in _OBJECTIVES:
        raise InputError(f"objective={name!r} is unknown; choose one of {', '.join(sorted(_OBJECTIVES))}.")
    return _OBJECTIVES[name]


register("local", lambda place, power: Objective(LocalError(place.unit.loss_axis, power)))
