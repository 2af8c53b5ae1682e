"""Configurations inferred from names and shapes alone."""

import numpy as np
import pytest

from sam_flax.config import VIT_B, VIT_H, VIT_L
from sam_flax.errors import InputWarning
from sam_flax.files.convert import convert
from sam_flax.files.infer import infer_config
from sam_flax.files.parameters import Dims, parameter_table


@pytest.mark.parametrize("base", [VIT_B, VIT_L, VIT_H], ids=["vit_b", "vit_l", "vit_h"])
def test_published_configurations_are_inferred_from_shapes(base):
    state = {
        name: np.broadcast_to(np.float32(0), entry.official_shape())
        for entry in parameter_table(Dims.from_config(base))
        for name in entry.official
    }
    assert infer_config(state) == base
    assert len(state) == {12: 314, 24: 482, 32: 594}[base.depth]  # as the published files have


def test_infer_config_reads_trees_too(tiny_tree, tiny_config):
    assert infer_config(tiny_tree[1], decoder_num_heads=4) == tiny_config


def test_window_as_large_as_the_grid_reads_as_global(tiny_state):
    state = dict(tiny_state)
    for i, axis in ((0, "h"), (0, "w"), (2, "h"), (2, "w")):
        state[f"image_encoder.blocks.{i}.attn.rel_pos_{axis}"] = np.zeros((15, 16), np.float32)
    config = infer_config(state, decoder_num_heads=4)
    assert config.global_attn_indexes == (0, 1, 2, 3) and config.window_size == config.grid == 8


def test_unknown_decoder_heads_are_said(tiny_state):
    with pytest.warns(InputWarning, match="8 are assumed: give decoder_num_heads"):
        assert convert(tiny_state)[0].decoder_num_heads == 8
