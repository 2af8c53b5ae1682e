"""Quantizers as frozen pytree dataclasses; `kinds` says of each how it is found, learned, stored and counted.

Each has ``encode(x)`` to integer codes ``0..2^bits-1``, ``decode(codes)`` to float32 values, ``fake_quant(x)`` equal
to ``decode(encode(x))`` with straight-through gradients, ``validate(channels=None)`` and ``with_gradient_scale``.
``bits`` is static; every number is an array leaf, so layers of one shape share one compilation.
"""

from __future__ import annotations

import jax
import numpy as np

from ahcptq_jax.quantizers.base import Quantizer as Quantizer
from ahcptq_jax.quantizers.base import lsq_factor as lsq_factor
from ahcptq_jax.quantizers.base import qparams_from_range as qparams_from_range
from ahcptq_jax.quantizers.base import scale_gradient as scale_gradient
from ahcptq_jax.quantizers.grouped import Grouped as Grouped
from ahcptq_jax.quantizers.hybrid import Hybrid as Hybrid
from ahcptq_jax.quantizers.hybrid import hybrid_fake_quant as hybrid_fake_quant
from ahcptq_jax.quantizers.hybrid import hybrid_scales as hybrid_scales
from ahcptq_jax.quantizers.log2 import Log2 as Log2
from ahcptq_jax.quantizers.log2 import log2_fake_quant as log2_fake_quant
from ahcptq_jax.quantizers.log_nonlinear import LogNonlinear as LogNonlinear
from ahcptq_jax.quantizers.uniform import Uniform as Uniform
from ahcptq_jax.quantizers.uniform import uniform_fake_quant as uniform_fake_quant


def fake_quant_lsq(quantizer: Quantizer, x: jax.Array) -> jax.Array:
    """``quantizer.fake_quant(x)`` with LSQ's gradient factor on the scales of the uniform and grouped quantizers.

    The log2 and hybrid scales are learned with their plain gradients, as in the official code.
    """
    return quantizer.with_gradient_scale(np.shape(x)).fake_quant(x)
