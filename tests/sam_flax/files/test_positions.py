"""SAMs whose tables of positions are for another input size, as fine-tuned ones are, and what must be asked for."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sam_flax import Sam, SamModel, load_sam, save_params
from sam_flax.files.convert import convert
from sam_flax.files.infer import infer_config
from sam_flax.files.known import Known
from sam_flax.preprocessing import resample

GLOBAL_BLOCKS = (1, 3)


def with_tables(state, window: int, table: int) -> dict[str, np.ndarray]:
    """`tiny_state` with other relative positions: for windows of `window` tokens, and `table` long in global blocks."""
    state, rng = dict(state), np.random.default_rng(table + window)
    for i in range(4):
        for axis in "hw":
            length = table if i in GLOBAL_BLOCKS else 2 * window - 1
            value = rng.normal(0, 0.3, (length, 16)).astype(np.float16)
            state[f"image_encoder.blocks.{i}.attn.rel_pos_{axis}"] = value.astype(np.float32)
    return state


def embedding(config, params) -> np.ndarray:
    size = config.img_size
    images = np.random.default_rng(0).normal(size=(1, size, size, 3)).astype(np.float32)
    return np.asarray(SamModel(Sam(config), params).encode_image(jnp.asarray(images)))


@pytest.mark.parametrize(("window", "table"), [(3, 31), (8, 31), (3, 11), (3, 20)])
def test_tables_of_another_size_are_read_as_the_official_code_does(tiny_state, golden, window, table):
    """The grid has 8x8 tokens: global tables of 15 fit it, as do those of windows of 8."""
    config, params = convert(with_tables(tiny_state, window, table), decoder_num_heads=4)
    assert (config.window_size, config.global_attn_indexes, config.grid) == (window, GLOBAL_BLOCKS, 8)
    want = golden("sam_tiny_positions_s0")[f"window{window}_table{table}"]
    np.testing.assert_allclose(embedding(config, params), want, atol=2e-5)
    assert infer_config(params, decoder_num_heads=4).img_size == 128  # the tree is one like any other


def lengths_of(state, lengths: tuple[int, ...]) -> dict[str, np.ndarray]:
    state = dict(state)
    for i, length in enumerate(lengths):
        for axis in "hw":
            state[f"image_encoder.blocks.{i}.attn.rel_pos_{axis}"] = np.zeros((length, 16), np.float32)
    return state


@pytest.mark.parametrize(
    ("lengths", "window", "blocks"),
    [
        ((5, 5, 5, 15), 3, (3,)),
        ((15, 15, 15, 15), 8, (0, 1, 2, 3)),
        ((5, 5, 5, 31), 3, (3,)),
        ((15, 15, 15, 31), 8, (3,)),
        ((27, 15, 27, 15), 14, (1, 3)),  # windows larger than the grid, as the official code pads to them
        ((27, 27, 27, 15), 14, (3,)),
        ((15, 5, 15, 15), 3, (0, 2, 3)),  # tables that fit the grid, longer than the windows': no doubt
    ],
)
def test_global_blocks_are_told_by_their_tables(tiny_state, lengths, window, blocks):
    config = infer_config(lengths_of(tiny_state, lengths), decoder_num_heads=4)
    assert (config.window_size, config.global_attn_indexes) == (window, blocks)


@pytest.mark.parametrize(
    "lengths",
    [(5, 5, 5, 5), (27, 27, 27, 27), (5, 7, 5, 15), (5, 5, 9, 31), (31, 5, 5, 5), (5, 31, 31, 31), (27, 15, 15, 15)],
)
def test_where_they_do_not_tell_they_are_asked_for(tiny_state, refused, lengths):
    state = lengths_of(tiny_state, lengths)
    refused(lambda: convert(state, decoder_num_heads=4), "give global_attn_indexes", "8x8", str(sorted(set(lengths))))
    blocks = tuple(i for i, n in enumerate(lengths) if n != lengths[0])
    if len({n for n in lengths if n == lengths[0]}) == 1:
        config, params = convert(state, decoder_num_heads=4, global_attn_indexes=blocks)
        assert (config.window_size, config.global_attn_indexes) == ((lengths[0] + 1) // 2, blocks)
        assert {len(params["image_encoder"][f"blocks_{i}"]["attn"]["rel_pos_h"]) for i in blocks} <= {15}
    whole, _ = convert(state, decoder_num_heads=4, global_attn_indexes=range(4))
    assert whole.global_attn_indexes == (0, 1, 2, 3)


def test_answers_that_do_not_fit(tiny_state, refused):
    def call(**known):
        return lambda: convert(tiny_state, decoder_num_heads=4, **known)

    refused(call(global_attn_indexes=(4,)), "(4,)", "it has 4")
    refused(call(global_attn_indexes=(1,)), "[5, 15]", "windowed", "(1,)")
    refused(call(global_attn_indexes=(-1,)), "(-1,)")
    refused(call(global_attn_indexes=3), "indexes of encoder blocks")
    refused(call(global_attn_indexes=(1.5,)), "(1.5,)")
    refused(call(img_size=100), "img_size=100", "patch size 16", "such as 96")
    for size in (0, -16, 1 << 40, 64.0, "64", True):
        refused(call(img_size=size), "img_size")
    refused(call(pixel_mean=(1, 2)), "pixel_mean")
    refused(call(pixel_mean=(1, 2, float("nan"))), "pixel_mean")
    refused(call(pixel_mean="red"), "pixel_mean")
    refused(call(pixel_std=(1, 0, 1)), "pixel_std", "above 0")
    refused(lambda: Known(decoder_num_heads=1.5), "decoder_num_heads=1.5")  # type: ignore[arg-type]
    state = lengths_of(tiny_state, (6, 15, 6, 15))
    refused(lambda: convert(state, global_attn_indexes=(1, 3)), "[6]", "one odd length")


def test_another_input_size(tiny_state, tiny_pth, tmp_path, refused):
    """Positions are interpolated bilinearly, global tables linearly, windowed ones stay; of any file."""
    config, params = convert(tiny_state, decoder_num_heads=4, img_size=192)
    assert (config.img_size, config.grid, config.window_size) == (192, 12, 3)
    encoder = params["image_encoder"]
    assert encoder["pos_embed"].shape == (1, 12, 12, 64)
    assert [len(encoder[f"blocks_{i}"]["attn"]["rel_pos_h"]) for i in range(4)] == [5, 23, 5, 23]
    table = tiny_state["image_encoder.blocks.1.attn.rel_pos_h"]
    np.testing.assert_array_equal(encoder["blocks_1"]["attn"]["rel_pos_h"], resample(table, (23, 16)))
    assert np.isfinite(embedding(config, params)).all()

    sam, loaded = load_sam(tiny_pth, decoder_num_heads=4, img_size=192)
    save_params(tmp_path / "own", *convert(tiny_state, decoder_num_heads=4))
    own, again = load_sam(tmp_path / "own", img_size=192)
    assert sam.config == own.config == loaded.config == again.config == config
    np.testing.assert_array_equal(embedding(config, loaded), embedding(config, again))
    np.testing.assert_array_equal(embedding(config, loaded), embedding(config, params))
    assert load_sam(tmp_path / "own", img_size=128)[0].config.img_size == 128

    # Where windows are as large as the grid, which blocks have them matters at every other size.
    state = lengths_of(tiny_state, (15, 15, 15, 15))
    refused(lambda: convert(state, decoder_num_heads=4, img_size=192), "give global_attn_indexes")
    save_params(tmp_path / "own", *convert(state, decoder_num_heads=4))
    refused(lambda: load_sam(tmp_path / "own", img_size=192), "own", "give global_attn_indexes")
    for config, _ in (
        convert(state, decoder_num_heads=4, img_size=192, global_attn_indexes=GLOBAL_BLOCKS),
        (load_sam(tmp_path / "own", img_size=192, global_attn_indexes=GLOBAL_BLOCKS)[0].config, None),
    ):
        assert (config.window_size, config.global_attn_indexes, config.grid) == (8, GLOBAL_BLOCKS, 12)


def test_positions_that_are_not_square_are_refused(tiny_state, refused):
    state = tiny_state | {"image_encoder.pos_embed": np.zeros((1, 8, 6, 64), np.float32)}
    refused(lambda: convert(state, decoder_num_heads=4), "pos_embed")


def test_pixel_statistics_that_are_given(tiny_state, tmp_path):
    """What the user says goes before what a file says."""
    statistics = {"pixel_mean": np.array([1.0, 2.0, 3.0]), "pixel_std": [4, 5, 6]}
    stored = tiny_state | {"pixel_mean": np.array([7, 8, 9], np.float32)}
    save_params(tmp_path / "own", *convert(stored, decoder_num_heads=4))
    configs = [
        convert(stored, decoder_num_heads=4, **statistics)[0],
        load_sam(tmp_path / "own", **statistics)[0].config,
        load_sam(tmp_path / "own", **statistics)[1].config,
    ]
    for config in configs:
        assert config.pixel_mean == (1, 2, 3) and config.pixel_std == (4, 5, 6)
    assert convert(stored, decoder_num_heads=4)[0].pixel_mean == (7, 8, 9)
    half = convert(stored, decoder_num_heads=4, pixel_std=(1, 1, 1))[0]
    assert half.pixel_mean == (7, 8, 9) and half == dataclasses.replace(
        configs[0], pixel_mean=(7, 8, 9), pixel_std=(1, 1, 1)
    )
