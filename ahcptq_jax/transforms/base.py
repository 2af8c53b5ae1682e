"""The interface of transforms, which rewrite the parameters before they are quantized, and the registry of them.

A recipe names its transforms in order. Each returns new floating-point parameters, of the same function unless it says
otherwise. Calibration, the search of weights and reconstruction all see the rewritten ones, and the artefact records
the names; what reconstruction aims at is the last function that was the model's own.
A new transform is a file here that ends in `register(...)`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Float32

from ahcptq_jax.architectures import Architecture
from sam_flax.errors import InputError
from sam_flax.sam import Params

# What a transform can need besides the parameters. Embeddings are computed with the parameters that it is given.
# Moments need a whole calibration, which is made before the transform and again after it.
NEEDS = ("embeddings", "moments")


class Moments(NamedTuple):
    """What a linear is given on the calibration images.

    Attributes:
        inputs: mean of x x^T over the rows x of its input in the floating-point model.
        errors: the same of the difference to its quantized input in the quantized model.
        rows: how many there were.
    """

    inputs: Float[Array | np.ndarray, "i i"]
    errors: Float[Array | np.ndarray, "i i"]
    rows: Any


@dataclasses.dataclass(frozen=True)
class Context:
    """Everything besides the parameters that a transform may look at.

    Attributes:
        architecture: the model's.
        sam: the module.
        embeddings: the encoder's output for each calibration image, for a transform that needs them; else none.
        boxes: for each calibration image its prompts, in canvas pixels.
        moments: yields (path, moments) of every quantized linear, for a transform that needs them; else none. They are
            made while they are asked for, and not kept.
    """

    architecture: Architecture
    sam: Any
    embeddings: Sequence[Any] = ()
    boxes: Sequence[Float32[np.ndarray, "p 4"]] = ()
    moments: Callable[[], Iterator[tuple[str, Moments]]] = lambda: iter(())


@dataclasses.dataclass(frozen=True)
class Transform:
    """A rewriting of floating-point parameters.

    Attributes:
        name: the name in recipes and artefacts, with its argument: "bimodal", "harder:1.0".
        apply: returns new parameters and leaves those that it is given alone.
        needs: names of `NEEDS` that the context must hold.
        keeps_function: whether the parameters compute what they did, but for rounding.
    """

    name: str
    apply: Callable[[Params, Context], Params]
    needs: tuple[str, ...] = ()
    keeps_function: bool = True

    def __post_init__(self) -> None:
        if unknown := [need for need in self.needs if need not in NEEDS]:
            raise ValueError(f"The transform {self.name} needs {unknown[0]!r}, which is none of {', '.join(NEEDS)}.")


_TRANSFORMS: dict[str, Callable[[str], Transform]] = {}


def register(name: str, make: Callable[[str], Transform]) -> None:
    """Makes a transform known.

    Args:
        name: the text before the colon in a recipe.
        make: returns the transform, given the text behind the colon ("" where there is none); raises InputError for a
            text that it cannot read.
    """
    _TRANSFORMS[name] = make


def transform_named(name: str) -> Transform:
    """The transform that a recipe names, such as "bimodal" or "harder:1.0".

    Raises:
        InputError: if there is none of this name, or its argument cannot be read.
    """
    kind, _, argument = name.partition(":")
    if kind not in _TRANSFORMS:
        raise InputError(f"The transform {name!r} is unknown; known are {', '.join(sorted(_TRANSFORMS))}.")
    return _TRANSFORMS[kind](argument)


def takes_nothing(name: str, argument: str) -> None:
    """Raises InputError if a transform without arguments was given one."""
    if argument:
        raise InputError(f"The transform {name} takes no argument, but was given {argument!r}.")
