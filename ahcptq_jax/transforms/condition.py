"""ACNR: linears whose small singular values are raised where inputs are quantized (AHCQ-SAM, arXiv 2503.03088 v4).

A linear with a large condition number answers errors of its input, which lie anywhere, as loudly as the few directions
that its inputs have. Its small singular values are drawn towards the mean of all, less where the error of the input is
large; reconstruction then brings the function back.

The released program measures each linear's errors after it has rewritten those before it. Here all are measured in one
pass, on the calibrated model: the term of the errors, with its weight of 0.001, is small beside the pull of 0.003.
"""

import numpy as np
from jaxtyping import Float

from ahcptq_jax.architectures.sites import flatten, unflatten
from ahcptq_jax.transforms.base import Context, Transform, register, takes_nothing
from sam_flax.sam import Params

WORST = 100.0  # condition numbers below it are let be
PULL, AVERSION, STEPS = 0.003, 0.001, 200  # lambda, beta and the number of steps
LEADING = 0.8  # share of the sum of squares whose singular values are kept


def reduce_condition(
    kernel: Float[np.ndarray, "i o"], errors: Float[np.ndarray, "i i"]
) -> tuple[Float[np.ndarray, "i o"], float, float]:
    """A kernel with a smaller condition number.

    `STEPS` times ``s_i' = (s_i + 2*lambda*t) / (1 + 2*lambda + 2*beta*C_i)``, with t the mean singular value and C_i
    the mean square of the input's error along the i-th left singular vector; a singular value of the tail, past
    `LEADING` of the sum of squares, becomes s_i' where that is larger.

    Args:
        kernel: the weights.
        errors: mean of e e^T of the errors e of the layer's input.

    Returns:
        The new kernel (the old one if its condition number is below `WORST`), and the condition numbers before and
        after.
    """
    left, values, right = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
    before = _condition(values)
    if before < WORST:
        return kernel, before, before
    along = np.einsum("ij,ik,kj->j", left, np.asarray(errors, np.float64), left, optimize=True)
    tail = np.cumsum(values**2) > LEADING * np.sum(values**2)
    for _ in range(STEPS):
        drawn = (values + 2 * PULL * values.mean()) / (1 + 2 * PULL + 2 * AVERSION * along)
        values = np.where(tail, np.maximum(values, drawn), values)
    return ((left * values) @ right).astype(np.float32), before, _condition(np.sort(values)[::-1])


def _condition(values: Float[np.ndarray, " n"]) -> float:
    """Largest by smallest singular value, both given in falling order."""
    return float(values[0] / max(values[-1], 1e-12 * values[0])) if values[0] > 0 else 1.0


def _apply(params: Params, context: Context) -> Params:
    flat = flatten(params)
    for layer, moments in context.moments():
        name = f"{layer}/kernel"
        flat[name] = reduce_condition(np.asarray(flat[name], np.float32), np.asarray(moments.errors))[0]
    return unflatten(flat)


def _make(argument: str) -> Transform:
    takes_nothing("acnr", argument)
    return Transform("acnr", _apply, needs=("moments",), keeps_function=False)


register("acnr", _make)
