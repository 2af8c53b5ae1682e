"""The interface of a transform, (parameters, what it may look at) -> parameters, and the registry of them.

A recipe names its transforms in order. Each rewrites the floating-point parameters before they are quantized;
calibration, the search of weights and reconstruction all see the rewritten ones, and the artefact records the names.
A new transform is a file here that ends in `register(...)`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ahcptq_jax.architectures import Architecture
from sam_flax.errors import InputError
from sam_flax.sam import Params

# What a transform can need besides the parameters. Embeddings are those of the parameters that it is given.
NEEDS = ("embeddings",)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a transform may look at.

    Attributes:
        architecture: of the model.
        sam: the module.
        embeddings: the encoder's output for each calibration image, for a transform that needs them; else none.
        boxes: for each calibration image the prompts (P, 4) in canvas pixels.
    """

    architecture: Architecture
    sam: Any
    embeddings: Sequence[Any] = ()
    boxes: Sequence[np.ndarray] = ()


@dataclasses.dataclass(frozen=True)
class Transform:
    """A rewriting of floating-point parameters.

    Attributes:
        name: what recipes and artefacts call it, with its argument: "bimodal", "harder:1.0".
        apply: returns new parameters and leaves those that it is given alone.
        needs: names of `NEEDS` that the context must hold.
    """

    name: str
    apply: Callable[[Params, Context], Params]
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := [need for need in self.needs if need not in NEEDS]:
            raise ValueError(f"The transform {self.name} needs {unknown[0]!r}, which is none of {', '.join(NEEDS)}.")


_TRANSFORMS: dict[str, Callable[[str], Transform]] = {}


def register(name: str, make: Callable[[str], Transform]) -> None:
    """Makes a transform known.

    Args:
        name: what stands before the colon in a recipe.
        make: the text behind the colon, "" where there is none -> the transform; raises InputError for a text that it
            cannot read.
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
