"""A calibration for a reconstruction: its searches see the grid, its quantizers stay off it until they are learned."""

import dataclasses

import numpy as np
import pytest

from ahcptq_jax.calibration.calibrate import calibrate
from ahcptq_jax.calibration.images import prepare_images
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import Grouped, Hybrid, Log2, LogNonlinear
from sam_flax import Sam


@pytest.mark.parametrize("lnq", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_searches_see_a_grid_that_quantizers_are_not_on(sam_tiny, lnq):
    """On six bits the search of softmax codes ends elsewhere than off the grid, with and without putting them on it."""
    config, params = sam_tiny
    rng = np.random.default_rng(0)
    sam, images = Sam(config), [rng.integers(0, 256, (60, 64, 3), dtype=np.uint8) for _ in range(2)]
    settings = QuantConfig(lnq=lnq, grid_bits=6, weight_search=False, big=False)
    canvases = prepare_images(images, sam, settings)
    on, off = (calibrate(sam, params, canvases, settings, off_grid=value).quantized for value in (False, True))
    without = calibrate(sam, params, canvases, dataclasses.replace(settings, grid_bits=0)).quantized
    assert (on.quant_config.grid_bits, off.quant_config.grid_bits) == (6, 0)
    moved = 0
    for path, quantizer in off.activations.items():
        if isinstance(quantizer, Log2 | LogNonlinear):
            assert (quantizer.grid_bits, on.activations[path].grid_bits) == (0, 6)
            np.testing.assert_array_equal(quantizer.scale, on.activations[path].scale)
            moved += not np.array_equal(quantizer.scale, without.activations[path].scale)
        elif isinstance(quantizer, Grouped | Hybrid):
            plain = without.activations[path]
            names = ("scale",) if isinstance(quantizer, Grouped) else ("scale_log", "scale_uniform")
            for name in names:
                np.testing.assert_array_equal(getattr(quantizer, name), getattr(plain, name))
    assert moved
