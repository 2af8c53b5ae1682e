"""The cache of a sweep: what it holds is bounded."""

import numpy as np

from ahcptq_jax.calibration.cache import Observed, Recent, StatisticsCache
from ahcptq_jax.runtime.quantized import QuantizedWeight


def weight(size):
    return QuantizedWeight(np.zeros(size, np.uint8), np.ones(2, np.float32), np.zeros(2, np.float32), (size, 2), 4)


def test_the_least_recently_used_are_forgotten_beyond_a_number_of_bytes():
    kept = Recent(most_bytes=3 * (1000 + 16))
    for name in "abc":
        kept[name] = weight(1000)
    assert kept["a"].packed.size == 1000 and kept.nbytes == 3 * 1016
    kept["d"] = weight(1000)
    assert set(kept) == {"a", "c", "d"}, "b was used longest ago"
    kept["a"] = weight(10)
    assert set(kept) == {"a", "c", "d"} and kept.nbytes == 2 * 1016 + 26
    kept["e"] = weight(10_000)
    assert set(kept) == {"e"}, "what is larger than the bound is kept alone"
    assert kept.get("a") is None and "a" not in kept


def test_a_sweep_over_many_models_holds_no_more_than_its_bound():
    """Each model has other weights and other passes; however many, the cache does not grow."""
    cache = StatisticsCache(passes=Recent(50_000), weights=Recent(50_000))
    for model in range(100):
        cache.keep_passes_of(f"model {model}")
        assert len(cache.passes) == 0
        for setting in range(3):
            cache.passes[setting] = Observed({"site": np.zeros(8, np.float32)}, [np.zeros((1, 8, 8, 64), np.float32)])
            cache.weights[model, setting] = weight(5000)
        assert cache.weights.nbytes <= 50_000 and cache.passes.nbytes <= 50_000


def test_passes_of_the_same_model_stay():
    cache = StatisticsCache()
    cache.keep_passes_of("model")
    cache.passes["setting"] = Observed({}, [])
    cache.keep_passes_of("model")
    assert "setting" in cache.passes
