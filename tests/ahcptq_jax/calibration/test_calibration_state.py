"""A killed calibration goes on after its last finished image and ends with the same result."""

import dataclasses
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahcptq_jax.api import quantize_model
from ahcptq_jax.architectures import architecture_named
from ahcptq_jax.calibration import rounds
from ahcptq_jax.calibration import weights as weights_module
from ahcptq_jax.calibration.cache import StatisticsCache
from ahcptq_jax.calibration.statistics import SiteRule, batch_statistics, init_statistics, relevant
from ahcptq_jax.config import ACT_RANGES, METHODS, QuantConfig
from ahcptq_jax.quantizers import Grouped
from ahcptq_jax.quantizers.kinds import kind_names
from ahcptq_jax.rules import Rule
from ahcptq_jax.runtime.quantized import Quantized
from sam_flax import Sam

IMAGES = 3
# The configuration, apart from the plain weight ranges, of most other tests: one compilation serves all.
CONFIG = QuantConfig(weight_search=False)
MINMAX = QuantConfig(**METHODS["minmax"])


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def setting(sam_tiny: Any) -> tuple[Sam, Any, list[np.ndarray]]:
    config, params = sam_tiny
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (config.img_size, config.img_size, 3), np.uint8) for _ in range(IMAGES)]
    return Sam(config), params, images


@pytest.fixture(scope="module")
def whole(setting: Any) -> Quantized:
    return quantize_model(*setting, CONFIG, progress=False)


def stages_run(monkeypatch: pytest.MonkeyPatch, until: int | None = None) -> list[int]:
    """Counts the parts of the model that are run; `until` lets the run be killed at that one."""
    count = [0]
    observe = rounds.run_captured

    def counting(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == until:
            raise Killed
        return observe(*args, **kwargs)

    monkeypatch.setattr(rounds, "run_captured", counting)
    return count


def assert_same(got: Quantized, want: Quantized) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_killed_calibration_ends_with_the_same_result(setting, whole, tmp_path, monkeypatch):
    per_image = setting[0].config.depth + 1
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stages_run(patch, until=2 * per_image + 2)  # within the third image
        quantize_model(*setting, CONFIG, progress=False, state_dir=tmp_path)
    assert len(list(tmp_path.glob("embedding_*.npz"))) == 2
    with monkeypatch.context() as patch:
        count = stages_run(patch)
        resumed = quantize_model(*setting, CONFIG, progress=False, state_dir=tmp_path)
    assert count[0] == per_image + IMAGES  # the third image, and the decoder for each
    assert_same(resumed, whole)
    # A third run takes everything from the folder.
    with monkeypatch.context() as patch:
        count = stages_run(patch)
        again = quantize_model(*setting, CONFIG, progress=False, state_dir=tmp_path)
    assert count[0] == IMAGES
    assert_same(again, whole)


def saved_state(setting: Any, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        stages_run(patch, until=setting[0].config.depth + 2)
        quantize_model(*setting, CONFIG, progress=False, state_dir=folder)


def test_another_runs_state_is_refused(setting, tmp_path):
    saved_state(setting, tmp_path)
    sam, params, images = setting
    for other in ((images[::-1], CONFIG), (images, QuantConfig(weight_search=False, seed=1))):
        with pytest.raises(ValueError, match="other weights, images or settings"):
            quantize_model(sam, params, *other, progress=False, state_dir=tmp_path)


def test_damaged_state_is_refused(setting, tmp_path):
    saved_state(setting, tmp_path)
    file = tmp_path / "embedding_0000.npz"
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(ValueError, match="embedding_0000.npz, which belongs to it, is missing"):
        quantize_model(*setting, CONFIG, progress=False, state_dir=tmp_path)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="embedding_0000.npz is damaged"):
        quantize_model(*setting, CONFIG, progress=False, state_dir=tmp_path)


def test_settings_share_what_was_observed(setting, whole, monkeypatch):
    """A pass over the images serves every setting whose own would be the same; the result is that without a cache."""
    sam, params, images = setting
    cache, per_image = StatisticsCache(), sam.config.depth + 2
    with monkeypatch.context() as patch:
        count = stages_run(patch)
        assert_same(quantize_model(*setting, CONFIG, progress=False, cache=cache), whole)
        assert count[0] == IMAGES * per_image
        assert_same(quantize_model(*setting, CONFIG, progress=False, cache=cache), whole)
        again = quantize_model(*setting, dataclasses.replace(CONFIG, groups=0), progress=False, cache=cache)
        assert count[0] == IMAGES * per_image, "groups are made of the same statistics"
        assert again.quant_config.groups == 0
        grouped = {path: q for path, q in again.activations.items() if isinstance(q, Grouped)}
        assert grouped and all(len(whole.activations[path].scale) == 4 for path in grouped)
        for path, quantizer in grouped.items():
            np.testing.assert_array_equal(quantizer.groups, np.arange(len(quantizer.scale)), err_msg=path)
        quantize_model(*setting, MINMAX, progress=False, cache=cache)
        assert count[0] == 2 * IMAGES * per_image, "another search is another pass"
        assert len(cache.passes) == 4
        quantize_model(sam, params, images[:1], CONFIG, progress=False, cache=cache)
        assert count[0] == (2 * IMAGES + 1) * per_image and len(cache.passes) == 2, "other images replace all"


def test_settings_share_quantized_weights(setting, whole, monkeypatch):
    sam, params, images = setting
    cache, searched = StatisticsCache(), []
    quantize_weight = weights_module.quantize_weight

    def counting(*args: Any, **kwargs: Any) -> Any:
        searched.append(args)
        return quantize_weight(*args, **kwargs)

    monkeypatch.setattr(weights_module, "quantize_weight", counting)
    assert_same(quantize_model(*setting, CONFIG, progress=False, cache=cache), whole)
    assert len(searched) == len(whole.weights)
    other_images = quantize_model(sam, params, images[:1], CONFIG, progress=False, cache=cache)
    assert len(searched) == len(whole.weights), "weights depend on no image"
    assert_same(other_images.weights, whole.weights)
    quantize_model(sam, params, images[:1], dataclasses.replace(CONFIG, w_bits=5), progress=False, cache=cache)
    assert len(searched) == 2 * len(whole.weights), "other widths are other weights"


# --- What statistics depend on ----------------------------------------------------------------------------------------

CHANGES: dict[str, Any] = {
    "w_bits": 5,
    "a_bits": 3,
    "hluq": False,
    "cag": False,
    "big": False,
    "agq": False,
    "groups": 2,
    "group_metric": "paper",
    "hluq_reach_maximum": True,
    "hluq_fine": True,
    "act_range": "percentile",
    "grid_bits": 8,
    "weight_search": False,
    "budget": "bytes:3",
    "pcc": True,
    "lnq": True,
    "acnr": True,
    "refit": True,
    "hluq_rows": 5,
    "softmax_rows": 5,
    "prompts_per_image": 3,
    "seed": 1,
    "rules": (Rule("lin2/input", w_bits=8),),
    "transforms": ("harder:1",),
}
TOKENS, CHANNELS = 9, 8


@functools.cache
def program(rule: SiteRule, config: QuantConfig) -> str:
    """How `batch_statistics` looks at a batch, its constants among it."""
    shape = (1, TOKENS, TOKENS) if rule.is_attention else (1, 3, 3, CHANNELS)
    captured = {rule.path: jnp.zeros(shape), "attn/operands": (jnp.zeros((1, TOKENS, CHANNELS)),) * 3}
    params = {"lin2": {"kernel": jnp.zeros((CHANNELS, 4))}}
    state = init_statistics(rule, shape, config)

    def look(state: Any, captured: Any, params: Any, key: Any) -> Any:
        states, sam_vit = {rule.path: state}, architecture_named("sam_vit")
        return batch_statistics(states, [rule], captured, params, key, config, sam_vit)

    closed = jax.make_jaxpr(look)(state, captured, params, jax.random.key(0))
    return f"{jax.tree.structure(state)} {closed.jaxpr} {[np.asarray(c).tolist() for c in closed.consts]}"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("lin2/input", "hybrid"),
        ("lin2/input", "grouped"),
        ("lin2/input", "uniform"),
        ("attn/softmax", "log2"),
        ("attn/softmax", "log_nonlinear"),
        ("attn/softmax", "uniform"),
    ],
)
@pytest.mark.parametrize("act_range", ACT_RANGES)
def test_what_a_statistic_does_not_name_does_not_change_it(path: str, kind: str, act_range: str) -> None:
    """Settings and widths that `depends_on` leaves out are equal programs, and so may share one and a pass."""
    assert set(CHANGES) == {field.name for field in dataclasses.fields(QuantConfig)}
    base = QuantConfig(act_range=act_range)
    for name, value in CHANGES.items():
        config = dataclasses.replace(base, **{name: value})
        rule = SiteRule(path, kind, config.a_bits)
        (kept,), needed = relevant([rule], config)
        assert program(rule, config) == program(kept, needed), name


def test_every_built_in_kind_is_tried_above() -> None:
    assert {"uniform", "grouped", "log2", "hybrid"} <= set(kind_names())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 KiB, less than a state."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"A small file system takes the right to mount one: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_gets_a_sentence_and_the_run_goes_on_with_room(
    setting: Any, whole: Quantized, small_disk: Path, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="make room on that disk") as caught:
        quantize_model(*setting, CONFIG, progress=False, state_dir=small_disk / "state")
    assert str(small_disk / "state") in str(caught.value) and "\n" not in str(caught.value)
    left = [path for path in small_disk.rglob("*") if path.is_file()]
    assert not [path for path in left if path.name.endswith(".part")]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    finished = quantize_model(*setting, CONFIG, progress=False, state_dir=small_disk / "state")
    for one, other in zip(jax.tree.leaves(finished), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other)
