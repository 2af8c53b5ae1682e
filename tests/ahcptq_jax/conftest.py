"""A small quantized SAM that several test files share."""

import numpy as np
import pytest

from ahcptq_jax import W4A4, Quantized, quantize
from sam_flax.sam import Sam


@pytest.fixture(scope="session")
def tiny_quantized(sam_tiny) -> Quantized:
    """`sam_tiny` at W4A4, calibrated on two random images."""
    config, params = sam_tiny
    rng = np.random.default_rng(0)
    boxes = np.array([[10.0, 12, 50, 60], [30, 5, 60, 60]])
    calib = [(rng.integers(0, 256, (100, 120, 3), dtype=np.uint8), boxes) for _ in range(2)]
    return quantize(params, calib, W4A4, sam=Sam(config))
