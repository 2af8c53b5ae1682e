"""Batch norms folded into the convolutions before them, so that a kernel is quantized as it is used.

What is left of a batch norm in a model that is used is a scale and an offset for every channel. The scale goes into the
kernel, whose channels have a scale of their own anyway; the offset stays behind the product, as a bias.
"""

from ahcptq_jax.transforms.base import Context, Transform, register, takes_nothing
from sam_flax.convolutions import folded
from sam_flax.sam import Params


def _make(argument: str) -> Transform:
    takes_nothing("fold_norms", argument)

    def apply(params: Params, context: Context) -> Params:
        del context
        return folded(params)

    return Transform("fold_norms", apply)


register("fold_norms", _make)
