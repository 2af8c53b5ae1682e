"""PCC: ranges by what attention focuses on."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ahcptq_jax import QuantConfig, quantize
from ahcptq_jax.architectures.sam_vit import SAM_VIT
from ahcptq_jax.calibration.perceptual import (
    PERCENTILES,
    Attention,
    focus,
    focus_loss,
    percentile_ranges,
    search_ranges,
)
from ahcptq_jax.config import METHODS
from ahcptq_jax.quantizers import Uniform
from sam_flax.sam import Sam


def test_focus_and_its_loss_by_hand():
    probabilities = jnp.array([[[[0.6, 0.31, 0.09], [0.4, 0.3, 0.3]]]])
    mask = focus(probabilities)
    np.testing.assert_array_equal(mask[0, 0], [[True, True, False], [True, True, True]])
    other = jnp.array([[[[True, False, False], [True, True, True]]]])
    # Four entries in common, five in either.
    assert float(focus_loss(mask, other)) == pytest.approx(1 - 4 / 5)
    assert float(focus_loss(mask, mask)) == 0


def test_there_are_29_percentiles_in_order():
    assert len(PERCENTILES) == 29 and list(PERCENTILES) == sorted(PERCENTILES)
    assert PERCENTILES[0] == 0.85 and PERCENTILES[-1] == 0.99999


def test_ranges_are_numpys_percentiles():
    values = np.random.default_rng(0).normal(size=(30, 70)).astype(np.float32)
    low, high = percentile_ranges(jnp.asarray(values))
    np.testing.assert_allclose(high, np.quantile(values.astype(np.float64), PERCENTILES), rtol=1e-5)
    np.testing.assert_allclose(low, np.quantile(values.astype(np.float64), 1 - np.array(PERCENTILES)), rtol=1e-5)


def far_keys(rng):
    """An attention whose scores are decided near zero, with a few channels of keys that are far away for all alike."""
    prompts, tokens, keys, width = 2, 6, 200, 16
    q, k = rng.normal(0, 1.5, (prompts, tokens, width)), rng.normal(0, 1.5, (prompts, keys, width))
    k[..., 0] = 160 + rng.normal(0, 0.01, (prompts, keys))  # shifts a row of scores alike: softmax does not see it
    q[..., 0] = 0.05
    eye = jnp.eye(width, dtype=jnp.float32)
    return Attention(
        (jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32)),
        (eye, eye),
        (jnp.zeros(width), jnp.zeros(width)),
        jnp.zeros(2),
    )


def map_of(attention, quantizers):
    """The focus of the attention, worked out here."""

    def rounded(x, quantizer):
        return np.asarray(quantizer.fake_quant(x)) if quantizer is not None else np.asarray(x)

    q, k = (rounded(rounded(attention.inputs[i], quantizers[i]), quantizers[i + 2]) for i in (0, 1))
    q, k = (a.reshape(*a.shape[:2], 2, -1).transpose(0, 2, 1, 3) for a in (q, k))
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return jnp.asarray(weights > 0.5 * weights.max(-1, keepdims=True))


def test_far_values_are_cut_and_the_focus_is_kept():
    attention = far_keys(np.random.default_rng(0))
    found = search_ranges(SAM_VIT, attention, (4, 4, 4, 4))
    reference = map_of(attention, [None] * 4)
    kept = float(focus_loss(map_of(attention, found), reference))
    wide = [Uniform.from_range(float(x.min()), float(x.max()), 4) for x in (*attention.inputs, *attention.inputs)]
    lost = float(focus_loss(map_of(attention, wide), reference))
    assert kept < 0.6 * lost
    top = 15 * float(found[1].scale)
    assert top < 40  # of keys that reach 160


def test_the_search_is_the_loop_that_it_is_said_to_be():
    """Two sweeps over the four sites, each the best of all ranges while the others stay as they are."""
    attention = far_keys(np.random.default_rng(1))
    found = search_ranges(SAM_VIT, attention, (4, 4, 4, 4))
    reference, chosen = map_of(attention, [None] * 4), [None] * 4
    values = [np.asarray(x, np.float64) for x in (*attention.inputs, *attention.inputs)]  # identity projections
    for _ in range(2):
        for site in range(4):
            best = None
            for share in PERCENTILES:
                low, high = np.quantile(values[site], 1 - share), np.quantile(values[site], share)
                tried = Uniform.from_range(np.float32(low), np.float32(high), 4)
                loss = float(focus_loss(map_of(attention, [*chosen[:site], tried, *chosen[site + 1 :]]), reference))
                if best is None or loss < best[0]:
                    best = (loss, tried)
            chosen[site] = best[1]
    for ours, theirs in zip(found, chosen, strict=True):
        assert float(ours.scale) == pytest.approx(float(theirs.scale), rel=1e-4)
        assert float(ours.zero_point) == float(theirs.zero_point)


@pytest.mark.slow
def test_the_method_end_to_end(sam_tiny):
    config, params = sam_tiny
    rng = np.random.default_rng(0)
    boxes = np.array([[10.0, 12, 50, 60], [30, 5, 60, 60]])
    calib = [(rng.integers(0, 256, (100, 120, 3), dtype=np.uint8), boxes) for _ in range(2)]
    settings = QuantConfig(**METHODS["saq_sam"])
    with_focus = quantize(params, calib, settings, sam=Sam(config))
    without = quantize(params, calib, dataclasses.replace(settings, pcc=False), sam=Sam(config))
    changed = {
        site
        for site, quantizer in with_focus.activations.items()
        if not np.array_equal(quantizer.scale, without.activations[site].scale)
    }
    attentions = 3 * config.decoder_depth + 1
    assert changed and all(site.startswith("mask_decoder/transformer") for site in changed)
    assert {site.rsplit("/", 1)[-1] for site in changed} <= {"input", "q", "k"}
    assert 2 * attentions < len(changed) <= 4 * attentions
    assert set(with_focus.activations) == set(without.activations)
