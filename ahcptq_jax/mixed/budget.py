"""What widths may cost, and the choice of the best ones as an integer program.

A model is a list of products. Each has options, pairs of widths for its two operands; each option has a cost, such as
bytes of weights, and a damage, the error that it causes in the model's output. One option of each product is taken, so
that the damages add up to the least within the budget.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse

from sam_flax.errors import InputError

WIDTHS = (2, 3, 4, 5, 6, 8)


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of two operands, of which one may be weights.

    Attributes:
        left: the site of the activations, such as "…/attn/qkv/input" or "…/attn/q".
        right: the site of the other operand inside an attention; None where it is the layer's weights.
        weights: how many weights it has, 0 without.
        macs: multiply-accumulates for one image with its prompts.
    """

    left: str
    right: str | None
    weights: int
    macs: int


class Option(NamedTuple):
    """The widths of a product's operands: those of `left`, and of `right` or the weights."""

    left: int
    right: int


# (product, width of its left operand, width of its right one or of its weights) -> cost. Widths may be fractions.
Cost = Callable[[Product, float, float], float]


def weight_bytes(product: Product, left: float, right: float) -> float:
    """Bytes of a product's weights."""
    del left
    return product.weights * right / 8


def bit_operations(product: Product, left: float, right: float) -> float:
    """BitOPs: multiply-accumulates times both widths."""
    return product.macs * left * right


# What a budget may count, by its name; others are added by those who know them, such as a model of hardware.
COSTS: dict[str, Cost] = {"bytes": weight_bytes, "bitops": bit_operations}


@dataclasses.dataclass(frozen=True)
class Budget:
    """At most what all products cost at one uniform width.

    Attributes:
        name: of `COSTS`.
        width: the uniform width, from 2 to 8; may be a fraction. None: the configuration's own widths.
    """

    name: str
    width: float | None


def parse_budget(text: str) -> Budget:
    """The budget of a text such as "bytes:3.5", or "bytes" for what the configuration's own widths would cost.

    Raises:
        InputError: if it names no known cost, or no width from 2 to 8.
    """
    found = re.fullmatch(r"(\w+)(?::(\d+(?:\.\d+)?))?", text.strip())
    width = None if found is None or found[2] is None else float(found[2])
    if found is None or found[1] not in COSTS or not (width is None or WIDTHS[0] <= width <= WIDTHS[-1]):
        raise InputError(
            f"budget={text!r} must be one of {', '.join(COSTS)}, alone or with a colon and an average width from "
            f"{WIDTHS[0]} to {WIDTHS[-1]}, such as bytes:3.5."
        )
    return Budget(found[1], width)


def solve(damages: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> list[int]:
    """The option of each product with the least sum of damages among those whose costs fit the budget.

    Args:
        damages: of each option of each product.
        costs: of the same options.
        budget: the most that the chosen ones may cost together.

    Raises:
        InputError: if even the cheapest options cost more.
    """
    least = sum(min(options) for options in costs)
    if least > budget * (1 + 1e-9):
        raise InputError(
            f"The budget allows {budget:.4g}, but the smallest widths that the rules leave cost {least:.4g}; raise the "
            "budget, or take widths out of the rules."
        )
    counts = [len(options) for options in damages]
    owner = np.repeat(np.arange(len(counts)), counts)
    one_each = scipy.sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    flat_damages, flat_costs = np.concatenate(damages), np.concatenate(costs)
    # In units of their own size, so that the solver's tolerances mean something.
    scale = max(float(flat_damages.max(initial=0.0)), 1e-300)
    # A dear option that damages less than the tolerance is not taken by chance: of equal damages the cheaper wins.
    objective = flat_damages / scale + 1e-9 * flat_costs / max(budget, 1e-300)
    found = scipy.optimize.milp(
        objective,
        integrality=np.ones(len(owner)),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint(flat_costs[None] / budget, -np.inf, 1 + 1e-9),
        ],
        options={"mip_rel_gap": 1e-6},
    )
    if not found.success:
        raise RuntimeError(f"The integer program of the widths was not solved: {found.message}")
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return [int(np.argmax(found.x[a : a + n])) for a, n in zip(starts, counts, strict=True)]
