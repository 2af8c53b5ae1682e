"""Objectives, which the reconstruction of a unit minimises: the local error of its output, and others that register.

An objective is prepared for a unit once. It may look at more than the unit's output and target: at arrays with a row
for each calibration image, such as prompts, and at what all images share, such as the rest of the model's parameters.
A new objective is a file that ends in `register(...)`; `ReconstructionConfig.objective` names it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Shaped

from ahcptq_jax.architectures import Architecture
from ahcptq_jax.architectures.base import Unit
from sam_flax.errors import InputError
from sam_flax.sam import Params


@runtime_checkable
class Loss(Protocol):
    """A function to minimise. It is hashable, because it is a static argument of the compiled step."""

    def __call__(
        self,
        output: Float[Array, "rows *shape"],
        target: Float[Array, "rows *shape"],
        context: tuple[Shaped[Array, "rows ..."], ...],
        shared: Any,
    ) -> Float[Array, ""]:
        """The loss of a batch.

        Args:
            output: the quantized unit's, with B*b rows for B images of b rows each.
            target: the floating-point unit's.
            context: rows of `Objective.context` for the same images.
            shared: `Objective.shared`.
        """


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss with what it looks at besides output and target.

    Attributes:
        loss: the function.
        context: arrays with b rows for each of the n calibration images.
        shared: a pytree of arrays that all images share.
    """

    loss: Loss
    context: tuple[Shaped[np.ndarray, "n b ..."], ...] = ()
    shared: Any = ()


@dataclasses.dataclass(frozen=True)
class Place:
    """A unit and the model around it, for objectives that look beyond the unit.

    Attributes:
        unit: the one that is learned.
        architecture: the model's.
        sam: the module.
        params: the floating-point parameters, after all transforms.
        boxes: for each calibration image its prompts, in canvas pixels.
    """

    unit: Unit
    architecture: Architecture
    sam: Any
    params: Params
    boxes: Sequence[Float32[np.ndarray, "p 4"]]


@dataclasses.dataclass(frozen=True)
class LocalError:
    """`mean(sum_over_axis(|output - target|^power))`, official `lp_loss`."""

    axis: int
    power: float = 2.0

    def __call__(
        self,
        output: Float[Array, "rows *shape"],
        target: Float[Array, "rows *shape"],
        context: tuple[Shaped[Array, "rows ..."], ...],
        shared: Any,
    ) -> Float[Array, ""]:
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
    """The function that prepares the objective which a configuration names.

    Raises:
        InputError: if there is none of this name.
    """
    if name not in _OBJECTIVES:
        raise InputError(f"objective={name!r} is unknown; choose one of {', '.join(sorted(_OBJECTIVES))}.")
    return _OBJECTIVES[name]


register("local", lambda place, power: Objective(LocalError(place.unit.loss_axis, power)))
