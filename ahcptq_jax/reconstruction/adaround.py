"""AdaRound, which learns whether each weight is rounded down or up (arXiv 2004.10568).

A weight ``w`` becomes ``(clip(floor(w/s) + h(alpha) + z, 0, 2^b-1) - z) * s``. While it is learned, ``h`` is the
rectified sigmoid, anywhere in 0..1; a regularizer drives it to the ends, and afterwards ``alpha >= 0`` decides.

Source: official ``AdaRoundFakeQuantize`` and ``LinearTempDecay``.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from ahcptq_jax.quantizers import Uniform

# The sigmoid is stretched to this interval before it is clipped to 0..1, so that 0 and 1 are reached.
GAMMA = -0.1
ZETA = 1.1


def rectified_sigmoid(alpha: Float[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
    """The share by which each weight is rounded up, ``clip(sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)``."""
    return jnp.clip(jax.nn.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def initial_alpha(
    weight: Float[Array | np.ndarray, "*shape"], scale: Float[Array | np.ndarray, "..."]
) -> Float[Array, "*shape"]:
    """The ``alpha`` at which the soft weight equals the weight itself, where that is in range.

    Args:
        weight: output channels last.
        scale: ``(out,)`` or scalar.

    Returns:
        The ``alpha``, which is not negative where rounding to nearest goes up.
    """
    ratio = weight / scale
    rest = ratio - jnp.floor(ratio)  # 0..1
    return -jnp.log((ZETA - GAMMA) / (rest - GAMMA) - 1.0)


def soft_weight(
    floor: Float[Array | np.ndarray, "*shape"], alpha: Float[Array | np.ndarray, "*shape"], quantizer: Uniform
) -> Float[Array, "*shape"]:
    """The weight while its rounding is learned, differentiable in ``alpha``.

    Args:
        floor: ``floor(weight / scale)``, output channels last; it never changes, so it is computed once.
        alpha: the variable that is learned.
        quantizer: its scale and zero point are scalars, or one for each output channel.
    """
    code = jnp.clip(floor + rectified_sigmoid(alpha) + quantizer.zero_point, 0.0, 2**quantizer.bits - 1)
    return (code - quantizer.zero_point) * quantizer.scale


def hard_codes(
    floor: Float[Array | np.ndarray, "*shape"], alpha: Float[Array | np.ndarray, "*shape"], quantizer: Uniform
) -> Int32[Array, "*shape"]:
    """The codes ``0..2^b-1`` that the learning decided on; the arguments are those of `soft_weight`."""
    code = floor + (alpha >= 0) + quantizer.zero_point
    return jnp.clip(code, 0, 2**quantizer.bits - 1).astype(jnp.int32)


def regularizer(
    alpha: Float[Array | np.ndarray, "*shape"], beta: Float[Array | np.ndarray, ""] | float | int
) -> Float[Array, "*shape"]:
    """The penalty ``1 - |2 h(alpha) - 1|^beta`` of each weight: 0 where it is decided, 1 where it is half-way.

    Args:
        alpha: the variable that is learned.
        beta: the exponent, at least 1; may be traced. A large one leaves weights free until they are nearly decided.
    """
    distance = jnp.abs(2.0 * rectified_sigmoid(alpha) - 1.0)
    # exp and log are vectorised on a CPU, the power function is not. The floor keeps the logarithm finite.
    return 1.0 - jnp.exp(beta * jnp.log(jnp.maximum(distance, 1e-12)))


def temperature(
    step: Int[Array, ""] | int, steps: int, warmup: float = 0.2, start: float = 20.0, end: float = 2.0
) -> Float[Array, ""]:
    """The regulariser's exponent after `step` of `steps` steps.

    Constant at `start` during the share `warmup` of all steps, then linear down to `end`.
    """
    warm = warmup * steps
    done = (jnp.asarray(step, jnp.float32) - warm) / max(steps - warm, 1.0)
    return end + (start - end) * (1.0 - jnp.clip(done, 0.0, 1.0))
