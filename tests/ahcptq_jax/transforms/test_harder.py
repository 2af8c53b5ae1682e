"""The harder model computes the same, with uneven channels and keys of two peaks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahcptq_jax.architectures.sites import flatten, intercept_sites
from ahcptq_jax.transforms import bimodal, transform_named
from ahcptq_jax.transforms.harder import make_harder
from sam_flax import Sam
from sam_flax.errors import InputError

BOXES = jnp.array([[10.0, 12, 70, 80], [30, 5, 90, 100]])
KEYS = "mask_decoder/transformer/layers_0/cross_attn_token_to_image/k"


@pytest.fixture(scope="module")
def outputs(sam_tiny):
    """(logits, iou, values of the sites named) of parameters, compiled once."""
    sam = Sam(sam_tiny[0])
    names = ("image_encoder/blocks_1/attn/qkv/input", "image_encoder/blocks_0/mlp/lin1/input", KEYS)
    size = sam.config.img_size
    image = jnp.asarray(np.random.default_rng(0).normal(size=(1, size, size, 3)), jnp.float32)

    @jax.jit
    def run(params):
        seen = {}

        def note(path, value):
            if path in names:
                seen[path] = value
            return value

        with intercept_sites(note):
            logits, iou = sam.apply({"params": params}, image, None, BOXES)
        return logits, iou, seen

    return run


def test_the_function_is_the_same_and_its_channels_are_not(sam_tiny, outputs):
    config, params = sam_tiny
    harder = make_harder(params, config, 1.0)
    assert {k: v.shape for k, v in flatten(harder).items()} == {k: v.shape for k, v in flatten(params).items()}
    logits, iou, before = outputs(params)
    got_logits, got_iou, after = outputs(harder)
    np.testing.assert_allclose(got_logits, logits, atol=2e-5 * float(jnp.abs(logits).max()))
    np.testing.assert_allclose(got_iou, iou, atol=2e-5 * float(jnp.abs(iou).max()))
    for path in before:
        if path == KEYS:
            continue
        ranges = [np.ptp(np.asarray(x[path]).reshape(-1, x[path].shape[-1]), axis=0) for x in (before, after)]
        spread = [np.log2(r).std() for r in ranges]
        assert spread[1] > spread[0] + 0.5, path


def test_keys_get_two_peaks_that_big_joins(sam_tiny, outputs):
    config, params = sam_tiny
    before, after = (np.asarray(outputs(p)[2][KEYS]) for p in (params, make_harder(params, config, 1.0)))
    assert not bimodal.is_bimodal(before)
    assert bimodal.is_bimodal(after)
    channels = after.transpose(0, 2, 1, 3).reshape(-1, after.shape[1] * after.shape[3])
    flipped = channels * bimodal.channel_signs(channels.mean(0))
    assert not bimodal.is_bimodal(flipped)


def test_gains_alone_change_no_bit(sam_tiny, monkeypatch, outputs):
    config, params = sam_tiny
    for name in ("_OFFSET", "_KEY"):
        monkeypatch.setattr(f"ahcptq_jax.transforms.harder.{name}", 0.0)
    harder = make_harder(params, config, 1.5, seed=3)
    assert not np.array_equal(
        flatten(harder)["image_encoder/neck/norm1/scale"], flatten(params)["image_encoder/neck/norm1/scale"]
    )
    np.testing.assert_array_equal(outputs(harder)[0], outputs(params)[0])


def test_offsets_stay_out_of_padded_windows(sam_tiny):
    """Windows of 3 do not divide the grid of 8: offsets there would miss the padding; windows of 4 do."""
    config, params = sam_tiny
    windowed = next(i for i in range(config.depth) if config.block_window(i))
    assert config.grid % config.window_size != 0

    def log_shift(config):
        before, after = (flatten(p) for p in (params, make_harder(params, config, 1.0)))
        norm = f"image_encoder/blocks_{windowed}/norm1"
        gains = after[f"{norm}/scale"] / before[f"{norm}/scale"]
        return np.abs(after[f"{norm}/bias"] - before[f"{norm}/bias"] * gains).max()

    assert log_shift(config) == 0
    assert log_shift(dataclasses.replace(config, window_size=4)) > 0.1


def test_strength(sam_tiny):
    config, params = sam_tiny
    assert make_harder(params, config, 0) is params
    first, second = (flatten(make_harder(params, config, 1.0, seed)) for seed in (0, 1))
    again = flatten(make_harder(params, config, 1.0, 0))
    assert all(np.array_equal(first[path], again[path]) for path in first)
    assert not all(np.array_equal(first[path], second[path]) for path in first)
    with pytest.raises(ValueError, match="strength=-1"):
        make_harder(params, config, -1)


@pytest.mark.parametrize("way", ["far", "conditioned", "bimodal", "channels"])
def test_each_way_alone_keeps_the_function_and_makes_what_it_is_named_for(sam_tiny, outputs, way):
    config, params = sam_tiny
    harder = make_harder(params, config, 1.0, way=way)
    logits, iou, _ = outputs(params)
    got_logits, got_iou, _ = outputs(harder)
    np.testing.assert_allclose(got_logits, logits, atol=1e-4 * float(jnp.abs(logits).max()))
    np.testing.assert_allclose(got_iou, iou, atol=1e-4 * float(jnp.abs(iou).max()))
    before, after = flatten(params), flatten(harder)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    if way == "far":
        names = {path.split("/")[-2] for path in changed}
        assert names == {"q_proj", "k_proj"} and all(path.startswith("mask_decoder/transformer") for path in changed)
        layer = "mask_decoder/transformer/final_attn_token_to_image"
        reaches = [
            3 * np.linalg.norm(after[f"{layer}/{name}/kernel"], axis=0) + np.abs(after[f"{layer}/{name}/bias"])
            for name in ("q_proj", "k_proj")
        ]
        assert all(150 < reach.max() < 400 for reach in reaches)
        assert sum((reach > 100).sum() for reach in reaches) <= max(2, len(reaches[0]) // 8)
    elif way == "conditioned":
        for block in range(config.depth):
            for layer in ("attn/qkv", "mlp/lin1"):
                assert np.linalg.cond(after[f"image_encoder/blocks_{block}/{layer}/kernel"]) >= 300
    elif way == "bimodal":
        assert changed and all(path.endswith("k_proj/bias") for path in changed)
    else:
        assert not any("k_proj" in path for path in changed)


def test_unknown_ways_are_refused(sam_tiny):
    config, params = sam_tiny
    with pytest.raises(InputError, match="one of the ways all, channels, bimodal, far, conditioned, not 'odd'"):
        make_harder(params, config, 1.0, way="odd")
    assert transform_named("harder:2,far").name == "harder:2,far"
    with pytest.raises(InputError, match="must end in one of"):
        transform_named("harder:2,odd")
