"""Histograms of codes: reading, pooling, and measuring on a quantized model."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from ahcptq_jax import W4A4, Quantized
from ahcptq_jax.architectures.sites import intercept_sites
from ahcptq_jax.quantizers import Hybrid, Log2, Quantizer
from ahcptq_jax.recipe import site_kind
from hwcost.counts import measure
from hwcost.counts.codes import Histogram, hybrid_shares, load_histograms, log2_shares, mini_codes, pooled, to_json
from hwcost.counts.measure import PROMPTS, measure_histograms
from sam_flax.config import SamConfig
from sam_flax.encoders import vit
from sam_flax.errors import InputError
from sam_flax.sam import Sam

TINY = SamConfig(
    img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, window_size=3, global_attn_indexes=(1,),
    out_chans=32, mask_in_chans=4, decoder_num_heads=1, decoder_mlp_dim=16, iou_head_hidden_dim=16,
)  # fmt: skip


def test_shares_follow_the_code_layouts() -> None:
    hybrid = hybrid_shares(Histogram(counts=(1, 1, 2, 4, 0, 0, 0, 0), log_levels=2))
    assert (hybrid.shift, hybrid.zero, hybrid.multiply) == (0.25, 0.25, 0.5)
    log2 = log2_shares(Histogram(counts=(1, 1, 1, 1), tau=1))
    assert (log2.shift, log2.zero, log2.multiply) == (0.75, 0.25, 0)


def test_pooling_weighs_sites_by_their_codes() -> None:
    sites = {
        "a": Histogram(counts=(30, 0, 0, 0), log_levels=1),
        "b": Histogram(counts=(0, 10, 0, 0), log_levels=2),
        "c": Histogram(counts=(1, 0, 0, 3), tau=2),
    }
    codes = pooled(sites, "test")
    assert (codes.hybrid.shift, codes.hybrid.zero) == (1.0, 0.0)
    assert (codes.tau, codes.grid_rate, codes.log2.zero) == (2, 0.25, 0.75)
    assert [codes.log_levels(b) for b in (2, 3, 4, 8)] == [1, 2, 4, 64]
    with pytest.raises(ValueError, match="pooling needs both kinds"):
        pooled({"a": sites["a"]}, "test")


def test_the_shipped_codes_are_those_of_every_site_of_mini() -> None:
    codes = mini_codes()
    assert 0 < codes.hybrid.multiply < codes.hybrid.zero < codes.hybrid.shift < 1
    assert codes.log2.multiply == 0 and codes.tau in (1, 2, 4)


def test_json_form_comes_back(tmp_path: Path) -> None:
    sites = {"s": Histogram(counts=(1, 2, 3, 4), tau=1), "h": Histogram(counts=(4, 3, 2, 1), log_levels=2)}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"other": 1, "code_histograms": to_json(sites)}))
    assert load_histograms(path) == sites


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "not readable JSON"),
        ("[]", 'no "code_histograms"'),
        ('{"code_histograms": {}}', 'no "code_histograms"'),
        ('{"code_histograms": {"s": "x"}}', "give a list of counts"),
        ('{"code_histograms": {"s": [1, 2, 3]}}', "none of 2 to 8 bits"),
        ('{"code_histograms": {"s": [1, -2, 3, 0]}}', "non-negative"),
        ('{"code_histograms": {"s": [1.5, 2, 3, 0]}}', "whole numbers"),
        ('{"code_histograms": {"s": {"tau": 1}}}', "needs counts"),
        ('{"code_histograms": {"s": {"counts": [1, 2, 3, 0], "tau": 3}}}', "tau=3"),
        ('{"code_histograms": {"s": {"counts": [1, 2, 3, 0], "log_levels": 3}}}', "log_levels=3"),
    ],
)
def test_a_damaged_file_gets_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        load_histograms(path)
    with pytest.raises(ValueError, match="not readable"):
        load_histograms(tmp_path / "absent.json")


def _quantized(sam: Sam) -> Quantized:
    """A model whose hybrid and log2 sites are quantized; calibrating one would take minutes of compilation."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(sam.init_params, jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    sites: list[str] = []
    with intercept_sites(lambda path, x: (sites.append(path), x)[1]):
        inputs = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32), jax.ShapeDtypeStruct((1, 4), np.float32)
        jax.eval_shape(lambda p, i, b: sam.apply({"params": p}, i, boxes=b), params, *inputs)
    activations: dict[str, Quantizer] = {}
    for path in sites:
        kind = site_kind(path, W4A4, "sam_vit")
        if kind == "hybrid":
            activations[path] = Hybrid.from_range(-0.2, 2.0, 0.3, 0.25, 4)
        elif kind == "log2":
            activations[path] = Log2(np.float32(1), np.float32(2), 4)
    return Quantized(params, {}, activations, sam, W4A4)


def test_measured_histograms_count_every_code_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(2)]
    sam = Sam(TINY)
    model = _quantized(sam)
    boxes = [np.array([[2.0, 3, 20, 30]]), np.array([[0.0, 0, 9, 9], [4, 4, 30, 30]])]
    measured = measure_histograms(model, images, boxes)

    tokens, windows, head = 16, 4, 9
    sizes = {path: sum(h.counts) for path, h in measured.items()}
    assert sizes["image_encoder/blocks_0/attn/softmax"] == 2 * TINY.num_heads * windows * head**2
    assert sizes["image_encoder/blocks_1/attn/softmax"] == 2 * TINY.num_heads * tokens**2
    assert sizes["image_encoder/blocks_1/mlp/lin2/input"] == 2 * tokens * 4 * TINY.embed_dim
    assert sizes["mask_decoder/transformer/layers_0/self_attn/softmax"] == 2 * PROMPTS * 7**2
    assert set(measured) == set(model.activations)

    # In chunks, as large models attend, the callbacks of all chunks add up to the same.
    asked = []
    monkeypatch.setattr(vit, "_attention_bytes", lambda: asked.append(1) or (0, 0))
    monkeypatch.setattr(vit, "QUERY_CHUNK", 4)
    assert measure_histograms(model, images, boxes) == measured
    assert asked, "traced anew"

    # Whatever the process's default, products are in full float32: other codes would be counted on a GPU.
    precisions = []
    decoded = measure.with_decoded
    monkeypatch.setattr(
        measure, "with_decoded", lambda *a: (precisions.append(jax.config.jax_default_matmul_precision), decoded(*a))[1]
    )
    with jax.default_matmul_precision("bfloat16"):
        measure_histograms(model, images, boxes)
    assert set(precisions) == {"float32"}

    with pytest.raises(InputError, match="2 images and 1 sets of boxes"):
        measure_histograms(model, images, boxes[:1])
