"""Least-norm refit of linears from what they see (Q-SAM2, arXiv 2506.09782).

Inputs of a linear do not fill all directions. Along those that calibration never shows, its weights decide nothing, but
they widen the ranges that are quantized. The refit takes, of all kernels that give the same outputs on the calibration
images, the one of the smallest norm: the pseudo-inverse of the inputs times the outputs, which is the old kernel
projected on the directions that occur.
"""

import numpy as np
from jaxtyping import Float

from ahcptq_jax.architectures.sites import flatten, unflatten
from ahcptq_jax.transforms.base import Context, Transform, register, takes_nothing
from sam_flax.sam import Params

# Directions with less than this share of the largest mean square count as never seen: float32's own errors are of the
# order of 1e-7 of the largest value, so 1e-14 of its square, and sums over many rows lose some digits more.
UNSEEN = 1e-10


def least_norm(kernel: Float[np.ndarray, "i o"], inputs: Float[np.ndarray, "i i"]) -> Float[np.ndarray, "i o"]:
    """The kernel of the smallest norm that does to inputs with these second moments what the given one does.

    Args:
        kernel: the weights.
        inputs: mean of x x^T over the rows x of the layer's input.
    """
    squares, directions = np.linalg.eigh(np.asarray(inputs, np.float64))
    seen = directions[:, squares > UNSEEN * squares[-1]]
    return (seen @ (seen.T @ np.asarray(kernel, np.float64))).astype(np.float32)


def _apply(params: Params, context: Context) -> Params:
    flat = flatten(params)
    for layer, moments in context.moments():
        name = f"{layer}/kernel"
        flat[name] = least_norm(np.asarray(flat[name], np.float32), np.asarray(moments.inputs))
    return unflatten(flat)


def _make(argument: str) -> Transform:
    takes_nothing("refit", argument)
    return Transform("refit", _apply, needs=("moments",), keeps_function=False)


register("refit", _make)
