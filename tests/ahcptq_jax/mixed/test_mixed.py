"""Mixed precision: the program against all choices, damages against what quantization does, and whole models."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ahcptq_jax import W4A4, QuantConfig, Rule, load, quantize
from ahcptq_jax.architectures import architecture_of
from ahcptq_jax.architectures.sites import flatten, unflatten
from ahcptq_jax.calibration.images import prepare_images
from ahcptq_jax.calibration.weights import quantize_weight
from ahcptq_jax.mixed import budget, choose_widths, sensitivity
from sam_flax.errors import InputError
from sam_flax.sam import Sam, call


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_program_finds_the_best_of_all_choices(data):
    products = data.draw(st.integers(1, 4))
    number = st.floats(0.01, 100)
    damages = [data.draw(st.lists(number, min_size=3, max_size=3)) for _ in range(products)]
    costs = [data.draw(st.lists(number, min_size=3, max_size=3)) for _ in range(products)]
    choices = list(itertools.product(range(3), repeat=products))
    total = {c: sum(costs[i][o] for i, o in enumerate(c)) for c in choices}
    allowed = data.draw(st.sampled_from(sorted(total.values())))
    found = budget.solve(damages, costs, allowed)
    best = min(sum(damages[i][o] for i, o in enumerate(c)) for c in choices if total[c] <= allowed * (1 + 1e-12))
    assert total[tuple(found)] <= allowed * (1 + 1e-6)
    assert sum(damages[i][o] for i, o in enumerate(found)) <= best * (1 + 1e-4) + 1e-9


def test_a_budget_below_the_smallest_widths_is_refused():
    with pytest.raises(InputError, match="the smallest widths that the rules leave cost 5"):
        budget.solve([[1.0, 2.0]], [[5.0, 6.0]], 4.0)


@pytest.mark.parametrize("text", ["", "bytes:", "bytes:1", "bytes:9", "joules:4", "bytes:x"])
def test_budgets_that_cannot_be_read(text):
    with pytest.raises(InputError, match="budget="):
        budget.parse_budget(text)
    assert budget.parse_budget("bitops:3.5") == budget.Budget("bitops", 3.5)
    assert budget.parse_budget("bytes") == budget.Budget("bytes", None)


@pytest.fixture(scope="module")
def calib():
    rng = np.random.default_rng(0)
    boxes = np.array([[10.0, 12, 50, 60], [30, 5, 60, 60]])
    return [(rng.integers(0, 256, (100, 120, 3), dtype=np.uint8), boxes) for _ in range(2)]


@pytest.mark.slow
def test_damages_foretell_what_the_logits_lose(sam_tiny, calib):
    """Over layers and widths, the predicted squared error and the true one rise together, and are of one size."""
    config, params = sam_tiny
    sam, architecture = Sam(config), architecture_of(Sam(config))
    image = prepare_images(calib, sam, W4A4)[0]
    canvas, boxes = jnp.asarray(image.canvas), jnp.asarray(image.boxes)
    flat = flatten(params)
    layers = tuple(f"image_encoder/blocks_{i}/{name}" for i in (0, 3) for name in ("attn/qkv", "mlp/lin2"))
    keys = jax.random.split(jax.random.key(0), 8)
    squared = [sensitivity.slopes(architecture, sam, params, canvas, boxes, key, layers, ()).kernels for key in keys]

    @jax.jit
    def logits(params):
        embedding = call(sam, params, canvas[None], method="encode_image")
        out = [
            call(sam, params, embedding, None, boxes, method="decode", multimask_output=many)[0].reshape(-1)
            for many in (False, True)
        ]
        return jnp.concatenate(out)

    before = logits(params)
    foretold, true = [], []
    for layer in layers:
        for bits in (3, 5):
            kernel = jnp.asarray(flat[f"{layer}/kernel"])
            weight = quantize_weight(kernel, bits, search=True)
            foretold.append(np.mean([float(sensitivity.kernel_damage(kernel, s[layer], weight)) for s in squared]))
            after = logits(unflatten(flat | {f"{layer}/kernel": weight.decode()}))
            true.append(float(jnp.mean(jnp.square(after - before))))
    assert np.corrcoef(np.log(foretold), np.log(true))[0, 1] > 0.9
    assert 0.2 < np.exp(np.mean(np.log(foretold) - np.log(true))) < 5


def average_bits(quantized):
    sizes = {path: int(np.prod(weight.shape)) for path, weight in quantized.weights.items()}
    return sum(n * quantized.weights[path].bits for path, n in sizes.items()) / sum(sizes.values())


@pytest.mark.slow
def test_a_model_within_its_budget_keeps_rules_and_survives_a_file(sam_tiny, calib, tmp_path):
    config, params = sam_tiny
    fixed = Rule(r"image_encoder/blocks_0/attn/qkv/input", w_bits=8)
    settings = dataclasses.replace(W4A4, budget="bytes:4.5", rules=(fixed,))
    quantized = quantize(params, calib, settings, sam=Sam(config), state_dir=tmp_path)
    widths = {path: weight.bits for path, weight in quantized.weights.items()}
    assert widths["image_encoder/blocks_0/attn/qkv"] == 8
    free = {path: weight for path, weight in quantized.weights.items() if path != "image_encoder/blocks_0/attn/qkv"}
    assert 4.2 < average_bits(dataclasses.replace(quantized, weights=free)) <= 4.5 and len({*widths.values()}) > 2
    assert {q.bits for q in quantized.activations.values()} == {4}
    again = quantize(params, calib, settings, sam=Sam(config), state_dir=tmp_path)
    assert again.quant_config == quantized.quant_config
    quantized.save(tmp_path / "mixed.safetensors")
    loaded = load(tmp_path / "mixed.safetensors")
    assert {path: weight.bits for path, weight in loaded.weights.items()} == widths


@pytest.mark.slow
def test_operations_choose_activations_too(sam_tiny, calib):
    config, params = sam_tiny
    sam = Sam(config)
    settings = QuantConfig(budget="bitops:4")
    images = prepare_images(calib, sam, settings)
    rules = choose_widths(sam, params, images, settings)
    by_site = {rule.pattern.replace("\\", ""): rule for rule in rules}
    assert {rule.a_bits for rule in rules} - {None} > {4} or len({rule.a_bits for rule in rules}) > 2
    architecture = architecture_of(sam)
    sites = sorted(quantize(params, calib, W4A4, sam=sam).activations)
    cost = allowed = 0.0
    for product in sensitivity.products(architecture, sam, params, len(images[0].boxes), sites):
        left = by_site[product.left].a_bits
        right = by_site[product.left].w_bits if product.right is None else 4
        if product.right in by_site:
            right = by_site[product.right].a_bits
        cost += product.macs * left * right
        allowed += product.macs * 16
    assert 0.8 * allowed < cost <= allowed * (1 + 1e-6)
