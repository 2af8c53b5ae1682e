"""A calibration for a reconstruction: its searches see the grid, its quantizers stay off it until they are learned."""

import dataclasses

import numpy as np
import pytest

from ahcptq_jax.architectures import architecture_of
from ahcptq_jax.calibration.images import prepare_images
from ahcptq_jax.calibration.passes import observe_encoder
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import Log2, LogNonlinear
from ahcptq_jax.recipe import recipe_of
from sam_flax import Sam


@pytest.mark.parametrize("lnq", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_searches_see_a_grid_that_quantizers_are_not_on(sam_tiny, lnq):
    """On six bits the search of softmax codes ends elsewhere than off the grid, with and without putting them on it."""
    config, params = sam_tiny
    sam, settings = Sam(config), QuantConfig(lnq=lnq, grid_bits=6, hluq=False, cag=False)
    image = np.random.default_rng(0).integers(0, 256, (60, 64, 3), dtype=np.uint8)
    canvases = [item.canvas for item in prepare_images([image], sam, settings)]
    recipe = recipe_of(architecture_of(sam), settings)
    on_no_grid = recipe_of(architecture_of(sam), dataclasses.replace(settings, grid_bits=0))
    recipes = (recipe, dataclasses.replace(recipe, off_grid=True), on_no_grid)
    on, off, without = (observe_encoder(sam, params, canvases, found)[0] for found in recipes)
    softmax = [path for path, quantizer in off.items() if isinstance(quantizer, Log2 | LogNonlinear)]
    assert softmax and not all(np.array_equal(off[path].scale, without[path].scale) for path in softmax)
    for path in softmax:
        assert (off[path].grid_bits, on[path].grid_bits) == (0, 6)
        np.testing.assert_array_equal(off[path].scale, on[path].scale)
