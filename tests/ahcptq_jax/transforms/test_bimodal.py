"""BIG: the official decisions, and sign flips that leave q.k alone."""

from pathlib import Path

import numpy as np
import pytest

from ahcptq_jax.transforms import bimodal

DATA = Path(__file__).parents[2] / "data" / "bimodal_s0.npz"


@pytest.mark.parametrize("name", ["bimodal", "unimodal"])
def test_density_and_peaks_are_the_official_ones(name: str) -> None:
    with np.load(DATA) as g:
        density = bimodal.estimate_density(g[f"x_{name}"][0])
        np.testing.assert_allclose(density.grid, g[f"grid_{name}"], atol=1e-6)
        np.testing.assert_allclose(density.density, g[f"kde_{name}"], atol=1e-6)
        np.testing.assert_array_equal(density.peaks, g[f"peaks_{name}"])
        assert density.is_bimodal == bool(g[f"is_bimodal_{name}"])
        assert bimodal.is_bimodal(g[f"x_{name}"][0]) == density.is_bimodal


def test_channel_signs_are_the_official_ones() -> None:
    with np.load(DATA) as g:
        np.testing.assert_array_equal(bimodal.channel_signs(g["x_bimodal"].mean((0, 1))), g["sign_bimodal"])
    np.testing.assert_array_equal(bimodal.channel_signs([0.0, -2.0, 3.0]), [1.0, -1.0, 1.0])


def test_a_part_of_many_values_decides_alike() -> None:
    rng = np.random.default_rng(0)
    signs = np.where(np.arange(64) % 2, 3.0, -3.0)
    two = rng.normal(size=(2000, 64)) + signs
    for values, expected in ((two, True), (two * np.sign(signs), False)):
        assert bimodal.is_bimodal(values) == expected
        part, whole = bimodal.estimate_density(values), bimodal.estimate_density(values, max_samples=None)
        assert np.abs(part.density - whole.density).max() < 0.05 * whole.density.max()


def test_flipping_makes_keys_unimodal_and_keeps_products() -> None:
    rng = np.random.default_rng(1)
    signs = np.where(np.arange(16) % 3 == 0, -4.0, 4.0)
    x = rng.normal(size=(500, 8)).astype(np.float32)
    query = {
        "kernel": rng.normal(size=(8, 16)).astype(np.float32),
        "bias": rng.normal(size=16).astype(np.float32),
    }
    key = {"kernel": 0.2 * rng.normal(size=(8, 16)).astype(np.float32), "bias": signs.astype(np.float32)}

    def project(params, x):
        return x @ params["kernel"] + params["bias"]

    keys = project(key, x)
    new_query, new_key = bimodal.flip_signs(query, key, keys.mean(0))
    assert bimodal.is_bimodal(keys) and not bimodal.is_bimodal(project(new_key, x))
    np.testing.assert_allclose(
        project(new_query, x) @ project(new_key, x).T, project(query, x) @ keys.T, rtol=1e-5, atol=1e-3
    )
    np.testing.assert_array_equal(key["bias"], signs)  # The arguments are left alone.


def test_flip_without_bias() -> None:
    params = {"kernel": np.ones((2, 2), np.float32)}
    query, key = bimodal.flip_signs(params, params, [-1.0, 1.0])
    assert set(query) == {"kernel"} and np.array_equal(key["kernel"], [[-1, 1], [-1, 1]])


def test_degenerate_and_bad_values() -> None:
    assert not bimodal.is_bimodal(np.full(100, 2.0))
    assert not bimodal.is_bimodal([1.0])
    for values in (np.array([]), np.array([1.0, np.nan])):
        with pytest.raises(ValueError, match="finite values"):
            bimodal.is_bimodal(values)
    with pytest.raises(ValueError, match="one entry per output channel of the query"):
        bimodal.flip_signs({"kernel": np.ones((2, 3))}, {"kernel": np.ones((2, 2))}, np.ones(2))
