"""Transforms of linears by what they see: ACNR, the least-norm refit, and the moments that both are given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahcptq_jax import W4A4, QuantConfig, ReconstructionConfig, quantize
from ahcptq_jax.architectures.sites import flatten, intercept_sites
from ahcptq_jax.calibration.calibrate import calibrate
from ahcptq_jax.calibration.images import prepare_images
from ahcptq_jax.calibration.moments import layer_moments
from ahcptq_jax.methods import RECONSTRUCTION_METHODS
from ahcptq_jax.transforms import transform_named
from ahcptq_jax.transforms.condition import reduce_condition
from ahcptq_jax.transforms.refit import least_norm
from sam_flax.errors import InputError
from sam_flax.sam import Sam, call


def ill_conditioned(rng, size=12, worst=1e4):
    left, _ = np.linalg.qr(rng.normal(size=(size, size)))
    right, _ = np.linalg.qr(rng.normal(size=(size, size)))
    return (left * np.geomspace(1, 1 / worst, size)) @ right, left


def test_singular_values_of_the_tail_follow_the_formula():
    rng = np.random.default_rng(0)
    kernel, left = ill_conditioned(rng)
    weights = rng.uniform(0, 50, 12)  # mean squares of the error along each left singular vector
    errors = (left * weights) @ left.T
    found, before, after = reduce_condition(kernel.astype(np.float32), errors)
    s = np.geomspace(1, 1e-4, 12)
    share = np.cumsum(s**2) / np.sum(s**2)
    for _ in range(200):
        t = np.mean(s)
        moved = [(a + 2 * 0.003 * t) / (1 + 2 * 0.003 + 2 * 0.001 * c) for a, c in zip(s, weights, strict=True)]
        s = np.array([max(a, b) if past > 0.8 else a for a, b, past in zip(s, moved, share, strict=True)])
    # A computed singular vector may be of either order where values are close; the kernel's own values are not.
    np.testing.assert_allclose(np.sort(np.linalg.svd(found, compute_uv=False)), np.sort(s), rtol=1e-3)
    assert before == pytest.approx(1e4, rel=1e-2) and after == pytest.approx(s.max() / s.min(), rel=1e-3)
    assert after < 0.02 * before


def test_a_well_conditioned_kernel_stays_itself():
    kernel = np.random.default_rng(1).normal(size=(8, 20)).astype(np.float32)
    assert reduce_condition(kernel, np.eye(8))[0] is kernel


def test_noise_comes_through_less():
    """What it is for: errors of the input in any direction disturb the output less beside what it says."""
    rng = np.random.default_rng(2)
    kernel, _ = ill_conditioned(rng, worst=1e3)
    better = reduce_condition(kernel.astype(np.float32), np.zeros((12, 12)))[0]

    def relative(kernel):
        return np.linalg.norm(kernel) / np.linalg.svd(kernel, compute_uv=False).min()

    assert relative(better) < 0.1 * relative(kernel)


def test_the_refit_is_the_pseudo_inverse_and_is_never_larger():
    rng = np.random.default_rng(3)
    inputs = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 9))  # four directions of nine
    kernel = rng.normal(size=(9, 5)).astype(np.float32)
    found = least_norm(kernel, inputs.T @ inputs / 50)
    np.testing.assert_allclose(found, np.linalg.pinv(inputs) @ (inputs @ kernel), atol=1e-5)
    np.testing.assert_allclose(inputs @ found, inputs @ kernel, atol=1e-4)
    assert np.linalg.norm(found) < 0.9 * np.linalg.norm(kernel)


@pytest.fixture(scope="module")
def calib():
    rng = np.random.default_rng(0)
    boxes = np.array([[10.0, 12, 50, 60], [30, 5, 60, 60]])
    return [(rng.integers(0, 256, (100, 120, 3), dtype=np.uint8), boxes) for _ in range(2)]


@pytest.mark.slow
def test_moments_are_those_of_what_each_linear_sees(sam_tiny, calib):
    config, params = sam_tiny
    sam = Sam(config)
    settings = dataclasses.replace(W4A4, big=False)
    images = prepare_images(calib, sam, settings)
    calibrated = calibrate(sam, params, images, settings)
    canvases, boxes = [image.canvas for image in images], [image.boxes for image in images]
    found = dict(layer_moments(params, calibrated.quantized, canvases, boxes, lambda items, label: items))
    linear = {p.removesuffix("/kernel") for p, v in flatten(params).items() if p.endswith("/kernel") and v.ndim == 2}
    assert set(found) == linear & set(calibrated.quantized.weights)

    activations = calibrated.quantized.activations

    def seen_by(tree, quantizers):
        """What every linear is given, of all images: (rows, channels)."""

        @jax.jit
        def run(tree, canvas, prompts):
            seen = {}

            def handle(path, value):
                if path in quantizers:
                    value = quantizers[path].fake_quant(value)
                if path.endswith("/input"):
                    seen[path] = value.reshape(-1, value.shape[-1])
                return value

            with intercept_sites(handle):
                embedding = call(sam, tree, canvas[None], method="encode_image")
                call(sam, tree, embedding, None, prompts, method="decode")
            return seen

        rows = [run(tree, jnp.asarray(c), jnp.asarray(p)) for c, p in zip(canvases, boxes, strict=True)]
        return {path: np.concatenate([np.asarray(r[path], np.float64) for r in rows]) for path in rows[0]}

    clean, noisy = seen_by(params, {}), seen_by(calibrated.quantized.float_params(), activations)
    for layer in ("image_encoder/blocks_0/attn/qkv", "mask_decoder/transformer/layers_0/mlp/lin2"):
        x, q = (seen[f"{layer}/input"] for seen in (clean, noisy))
        assert found[layer].rows == len(x)
        np.testing.assert_allclose(found[layer].inputs, x.T @ x / len(x), rtol=1e-3, atol=1e-3 * np.mean(x**2))
        error = (x - q).T @ (x - q) / len(x)
        np.testing.assert_allclose(found[layer].errors, error, rtol=0.05, atol=0.05 * np.abs(error).max())


@pytest.mark.slow
def test_methods_with_them_end_to_end(sam_tiny, calib, tmp_path):
    """ACNR changes the function, and what is learned aims at the model's own; a resumed run ends with the same bits."""
    config, params = sam_tiny
    sam = Sam(config)
    spread = flatten(params)
    for path in spread:
        if path.endswith("qkv/kernel"):
            left, values, right = np.linalg.svd(np.asarray(spread[path]), full_matrices=False)
            spread[path] = jnp.asarray((left * np.geomspace(values[0], values[0] / 1e3, len(values))) @ right)
    params = jax.tree.unflatten(jax.tree.structure(params), [spread[p] for p in flatten(params)])
    method = RECONSTRUCTION_METHODS["ahcq_sam"]
    settings = method.quant_config(refit=True)
    images = prepare_images(calib, sam, settings)
    calibrated = calibrate(sam, params, images, settings)
    path = "image_encoder/blocks_0/attn/qkv/kernel"
    condition = [np.linalg.cond(np.asarray(flatten(tree)[path])) for tree in (calibrated.original, calibrated.params)]
    assert condition[0] > 500 and condition[1] < 0.2 * condition[0]
    assert {q for q in calibrated.quantized.activations if q.endswith("softmax")}

    learning = ReconstructionConfig(iterations=4, parts=("encoder_attention",))
    first = quantize(params, calib, settings, sam=sam, reconstruction=learning, state_dir=tmp_path)
    again = quantize(params, calib, settings, sam=sam, reconstruction=learning, state_dir=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, first.weights, again.weights)
    file = tmp_path / "model.safetensors"
    first.save(file)


def test_arguments_are_refused():
    for name in ("acnr:2", "refit:x"):
        with pytest.raises(InputError, match="takes no argument"):
            transform_named(name)
    assert QuantConfig(acnr=True).acnr and not QuantConfig().acnr
