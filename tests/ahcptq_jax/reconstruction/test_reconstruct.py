"""Reconstruction on a SAM of three tiny blocks: units, learning, grouping, resuming, refusals."""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahcptq_jax import api
from ahcptq_jax.architectures.sam_vit import SAM_VIT
from ahcptq_jax.architectures.sites import flatten, intercept_sites, unflatten
from ahcptq_jax.calibration import saved_state
from ahcptq_jax.calibration.calibrate import Calibrated
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import Grouped, Hybrid, Log2, Uniform
from ahcptq_jax.recipe import site_kind, weight_path
from ahcptq_jax.reconstruction import adaround, learning, together, units
from ahcptq_jax.reconstruction import run as job
from ahcptq_jax.reconstruction.config import ReconstructionConfig
from ahcptq_jax.reconstruction.folder import arrays_of
from ahcptq_jax.reconstruction.objectives import LocalError
from ahcptq_jax.reconstruction.run import reconstruct
from ahcptq_jax.reconstruction.units import GRANULARITIES, PARTS, decoder_units, encoder_units, run_unit
from ahcptq_jax.runtime.quantized import Quantized, QuantizedWeight
from experiments import coco, evaluate
from experiments.scenes import scenes
from sam_flax import VIT_B, Sam, SamConfig, SamModel, SamPredictor, load_sam
from sam_flax.errors import InputError

BITS = 3
IMAGES = 3
GROUPS = 2
START = QuantConfig(w_bits=BITS, a_bits=4, groups=0)
TARGET = dataclasses.replace(START, groups=GROUPS)
# One configuration for nearly all tests, so that each unit's step is compiled once.
CONFIG = ReconstructionConfig(iterations=40, batch=2, chunk=7, rounding_rate=0.02, scale_rate=2e-3)


@pytest.fixture(scope="module")
def sam():
    return Sam(
        SamConfig(
            img_size=32,
            patch_size=8,
            embed_dim=16,
            depth=3,
            num_heads=2,
            window_size=2,
            global_attn_indexes=(2,),
            mlp_ratio=2.0,
            out_chans=16,
            mask_in_chans=4,
            decoder_depth=1,
            decoder_num_heads=2,
            decoder_mlp_dim=32,
            num_multimask_outputs=1,
            iou_head_depth=2,
            iou_head_hidden_dim=16,
        )
    )


@pytest.fixture(scope="module")
def params(sam):
    return sam.init_params(jax.random.key(3))


@pytest.fixture(scope="module")
def images():
    return list(np.random.default_rng(0).normal(size=(IMAGES, 32, 32, 3)).astype(np.float32))


@pytest.fixture(scope="module")
def boxes():
    corners = np.random.default_rng(1).uniform(0, 15, size=(IMAGES, 2, 4)).astype(np.float32)
    return list(corners + np.array([0, 0, 16, 16], np.float32))


def calibrate(sam, params, images, boxes, bits=BITS):
    """Per-channel ranges over the images; `quantize_model` gives the same kinds, and compiles for a minute."""

    @jax.jit
    def ranges(params, image, prompts):
        seen = {}

        def note(path, value):
            if not isinstance(value, tuple):
                seen[path] = value.reshape(-1, value.shape[-1])
            return value

        with intercept_sites(note):
            sam.apply({"params": params}, image, None, prompts)
        return {path: (x.min(0), x.max(0)) for path, x in seen.items()}

    low, high = {}, {}
    for image, prompts in zip(images, boxes, strict=True):
        for path, (a, b) in ranges(params, image[None], prompts).items():
            low[path] = np.minimum(low.get(path, np.inf), a)
            high[path] = np.maximum(high.get(path, -np.inf), b)
    activations = {}
    for path in low:
        a, b = low[path].min(), high[path].max()
        match site_kind(path, START, "sam_vit"):
            case "uniform":
                activations[path] = Uniform.from_range(a, b, 4)
            case "grouped":
                channels = Uniform.from_range(low[path], high[path], 4)
                activations[path] = Grouped(channels.scale, channels.zero_point, jnp.arange(low[path].size), 4)
            case "hybrid":
                # Below the maximum: where nothing is cut off, its logarithmic scale has no gradient, nor has log2's.
                activations[path] = Hybrid.from_range(a, 0.7 * (b - a), 0.3, 0.25, 4)
            case "log2":
                activations[path] = Log2(jnp.float32(0.7 * b), jnp.int32(2), 4)
    flat, weights = flatten(params), {}
    for site in activations:
        if (layer := weight_path(site)) is not None:
            kernel = np.asarray(flat.pop(f"{layer}/kernel"))
            matrix = kernel.reshape(-1, kernel.shape[-1])
            uniform = Uniform.from_range(matrix.min(0), matrix.max(0), bits)
            weights[layer] = QuantizedWeight.from_codes(uniform.encode(kernel), uniform.scale, uniform.zero_point, bits)
    return Quantized(unflatten(flat), weights, activations, sam, dataclasses.replace(START, w_bits=bits))


@pytest.fixture(scope="module")
def calibrated(sam, params, images, boxes):
    return calibrate(sam, params, images, boxes)


@pytest.fixture(scope="module")
def run(sam, params, calibrated, images, boxes):
    """`reconstruct` on the tiny model; changes of the configuration as keywords."""

    def run(state_dir=None, on_unit=None, **changes) -> Quantized:
        config = dataclasses.replace(CONFIG, **changes)
        args = sam, params, calibrated, images, boxes, config
        return reconstruct(*args, target=TARGET, state_dir=state_dir, on_unit=on_unit)

    return run


@pytest.fixture(scope="module")
def compilations():
    """Counted by `finished`."""
    return {}


@pytest.fixture(scope="module")
def finished(run, compilations):
    """The result, and the report of every unit."""
    reports = []
    together._gradient.clear_cache()
    units.capture_decoder.clear_cache()
    result = run(on_unit=reports.append)
    compilations["steps"] = together._gradient._cache_size()
    compilations["captures"] = units.capture_decoder._cache_size()
    return result, reports


@pytest.fixture(scope="module")
def plain():
    """The reports of `untouched`."""
    return []


@pytest.fixture(scope="module")
def untouched(run, plain):
    """Grouped as `finished`, but nothing learned."""
    return run(on_unit=plain.append, parts=())


def assert_same(a: Quantized, b: Quantized) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for path, x in jax.tree_util.tree_leaves_with_path(a):
        y = dict(jax.tree_util.tree_leaves_with_path(b))[path]
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


# --- Units ------------------------------------------------------------------------------------------------------------


def test_blocks_of_one_kind_are_one_operation():
    units = encoder_units(Sam(VIT_B))
    assert len(units) == 2 * VIT_B.depth + 1
    # Windowed attention, global attention, MLP, neck.
    assert len({unit.operation for unit in units}) == 4
    whole = encoder_units(Sam(VIT_B), "block")
    assert len(whole) == VIT_B.depth + 1 and len({unit.operation for unit in whole}) == 3
    units = decoder_units(Sam(VIT_B))
    assert len(units) == 2 * 4 + 1
    assert len({unit.operation for unit in units}) == 3


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_units_in_turn_are_the_encoder(sam, params, images, granularity):
    image = jnp.asarray(images[0][None])
    x = sam.apply({"params": params}, image, method=lambda m, i: m.image_encoder.patch_embed(i))
    x = x + params["image_encoder"]["pos_embed"]
    for unit in encoder_units(sam, granularity):
        x = run_unit(unit.operation, unflatten(unit.own(flatten(params))), {}, {}, (x,))
    expected = jax.jit(lambda p, i: sam.apply({"params": p}, i, method="encode_image"))(params, image)
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)


def test_captured_inputs_give_the_captured_outputs(sam, params, boxes):
    found_units = decoder_units(sam)
    embedding = np.random.default_rng(0).normal(size=(1, 4, 4, 16)).astype(np.float32)
    found = units.capture_decoder(
        sam, params, {}, {}, embedding, boxes[0], names=tuple(unit.name for unit in found_units)
    )
    for unit in found_units:
        args, output = found[unit.name]
        again = run_unit(unit.operation, unflatten(unit.own(flatten(params))), {}, {}, args)
        np.testing.assert_allclose(again, output, rtol=1e-4, atol=1e-5)


def test_parameters_that_were_quantized_are_known_by_what_stays_in_floating_point(sam, params, images, boxes):
    """Whatever the weights: at 2 bits a few large ones are most of a kernel, and no code tells of the rest."""
    flat = flatten(params)
    kernel = np.array(flat["image_encoder/blocks_0/mlp/lin1/kernel"])
    kernel[0] = 100 * np.random.default_rng(0).choice([-1.0, 1.0], kernel.shape[1])
    outlying = unflatten(flat | {"image_encoder/blocks_0/mlp/lin1/kernel": jnp.asarray(kernel)})
    calibrated = calibrate(sam, outlying, images, boxes, bits=2)
    nothing = dataclasses.replace(CONFIG, parts=())
    target = dataclasses.replace(calibrated.quant_config, groups=GROUPS)
    job._check_parameters(outlying, calibrated)
    # As a file rounds what stays in floating point.
    rounded = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float16), jnp.float32), calibrated.params)
    job._check_parameters(outlying, dataclasses.replace(calibrated, params=rounded))
    for path in ("image_encoder/blocks_1/norm1/bias", "mask_decoder/iou_token"):
        other = unflatten(flatten(outlying) | {path: flatten(outlying)[path] + 1})
        with pytest.raises(InputError, match=f"not those that were quantized: {path} has other values"):
            reconstruct(sam, other, calibrated, images, boxes, nothing, target=target)
    without = {k: v for k, v in flatten(outlying).items() if k != "mask_decoder/iou_token"}
    with pytest.raises(InputError, match="mask_decoder/iou_token has another shape, or none"):
        reconstruct(sam, unflatten(without), calibrated, images, boxes, nothing, target=target)


# --- Result -----------------------------------------------------------------------------------------------------------


def test_every_unit_is_done_in_forward_order(sam, finished):
    names = [report.name for report in finished[1]]
    assert names == [unit.name for unit in encoder_units(sam) + decoder_units(sam)]
    units = [unit for granularity in GRANULARITIES for unit in encoder_units(sam, granularity)]
    units += [*decoder_units(sam), SAM_VIT.whole_decoder(sam)]
    assert {unit.part for unit in units} == set(PARTS)


def test_every_layer_is_hard_and_nothing_is_random(finished, images, boxes):
    quantized, _ = finished
    for layer, weight in quantized.weights.items():
        values = np.asarray(weight.decode()).reshape(-1, weight.shape[-1])
        distinct = [len(np.unique(column)) for column in values.T]
        assert max(distinct) <= 2**BITS, layer
    assert len(quantized.weights) > 2 * len(encoder_units(quantized.sam))  # units of several layers are among them
    for path, quantizer in quantized.activations.items():
        quantizer.validate()
        assert not isinstance(quantizer, Grouped) or quantizer.scale.shape == (GROUPS,), path
    assert quantized.quant_config == TARGET
    embedding = quantized.encode_image(images[0][None])
    np.testing.assert_array_equal(embedding, quantized.encode_image(images[0][None]))
    logits, iou = quantized.decode(embedding, boxes=boxes[0])
    assert np.isfinite(logits).all() and np.isfinite(iou).all()


def test_rounding_and_scales_were_learned(finished, calibrated):
    quantized, _ = finished
    for layer, weight in quantized.weights.items():
        before = calibrated.weights[layer]
        np.testing.assert_array_equal(weight.scale, before.scale)
        changed = np.mean(np.asarray(weight.codes()) != np.asarray(before.codes()))
        assert 0 < changed < 0.5, layer
        # A weight goes to one of its two neighbours.
        assert np.abs(np.asarray(weight.codes(), int) - np.asarray(before.codes(), int)).max() == 1
    kinds = set()
    for path, quantizer in quantized.activations.items():
        before = calibrated.activations[path]
        kinds.add(type(quantizer))
        for name in arrays_of(quantizer).keys() - {"groups"}:
            if isinstance(quantizer, Grouped):
                continue  # grouping alone changes it: see below
            same = np.array_equal(getattr(quantizer, name), getattr(before, name))
            assert same != (name in ("scale", "scale_log", "scale_uniform")), f"{path} {name}"
    assert kinds == {Uniform, Grouped, Log2, Hybrid}


def test_scales_of_groups_were_learned(finished, untouched):
    grouped = {path: q for path, q in finished[0].activations.items() if isinstance(q, Grouped)}
    for path, quantizer in grouped.items():
        assert (np.asarray(quantizer.scale) != np.asarray(untouched.activations[path].scale)).all(), path
    assert len(grouped) > 10


def test_learning_lowers_the_errors(finished, plain, untouched):
    learned = finished[1]
    better = [a.after < b.after for a, b in zip(learned, plain, strict=True)]
    assert sum(better) >= len(better) - 2
    assert sum(a.after for a in learned) < 0.9 * sum(b.after for b in plain)
    # Without learning, channels are grouped and codes stay.
    assert {q.scale.shape for q in untouched.activations.values() if isinstance(q, Grouped)} == {(GROUPS,)}


def test_each_shape_is_compiled_once(finished, compilations):
    del finished
    # Attention windowed and global, MLP, neck; in the decoder self, token to image (twice), image to token, MLP.
    assert compilations["steps"] == 8
    # Floating-point and quantized, whatever has been grouped.
    assert compilations["captures"] == 2


# --- Learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [2.0, 3.0])  # the paper's, and another
def test_loss_is_the_papers(sam, params, calibrated, power):
    """Without drops, learning rates of zero and no regularizer: the soft weights are the weights themselves."""
    unit = next(u for u in encoder_units(sam) if u.part == "encoder_mlp")
    config = ReconstructionConfig(
        iterations=10, rounding_rate=0, scale_rate=0, input_drop=0, activation_drop=1, warmup=1, loss_power=power
    )
    flat = unit.own(flatten(params))
    for layer, weight in unit.own(calibrated.weights).items():
        # Within the codes: the rounding of a zero point cuts up to half a step off a range.
        low, high = (weight.scale * (end - weight.zero_point) for end in (0, 2**BITS - 1))
        flat[f"{layer}/kernel"] = jnp.clip(flat[f"{layer}/kernel"], low, high)
    own = unflatten(flat)
    problem, state = learning.start(own, unit.own(calibrated.weights), unit.own(calibrated.activations), config)
    x, target = np.random.default_rng(0).normal(size=(2, 1, 1, 4, 4, 16)).astype(np.float32)
    store = ((x,), (x + 1,), target, ())
    output = run_unit(unit.operation, own, {}, {}, (x[0],))
    expected = (np.abs(np.asarray(output) - target[0]) ** power).sum(1).mean()
    _, losses = learning.advance(
        problem,
        state,
        store,
        jnp.zeros(10, jnp.int32),
        jnp.int32(0),
        jnp.int32(3),
        jax.random.key(0),
        how=learning.Learning(unit.operation, LocalError(unit.loss_axis, power), config),
    )
    np.testing.assert_allclose(losses, [expected, 0], rtol=1e-4)


def test_the_regularizer_is_on_after_the_warm_up(sam, params, calibrated):
    """With learning rates of zero, its mean over the iterations follows from the alphas of the start."""
    unit = next(u for u in encoder_units(sam) if u.part == "encoder_mlp")
    config = ReconstructionConfig(iterations=10, rounding_rate=0, scale_rate=0, warmup=0.5, rounding_weight=0.3)
    own = unflatten(unit.own(flatten(params)))
    x = np.random.default_rng(0).normal(size=(1, 1, 4, 4, 16)).astype(np.float32)

    def penalty(first: int, last: int) -> float:
        problem, state = learning.start(own, unit.own(calibrated.weights), unit.own(calibrated.activations), config)
        _, losses = learning.advance(
            problem,
            state,
            ((x,), (x,), x, ()),
            jnp.zeros(10, jnp.int32),
            jnp.int32(first),
            jnp.int32(last),
            jax.random.key(0),
            how=learning.Learning(unit.operation, LocalError(unit.loss_axis), config),
        )
        return float(losses[1])

    assert penalty(0, 4) == 0
    _, state = learning.start(own, unit.own(calibrated.weights), unit.own(calibrated.activations), config)
    # Iterations are counted from 1 there; the exponent falls from 20 to 2 between the fifth and the tenth.
    expected = [
        0.3 * sum(np.sum(1 - np.abs(2 * np.asarray(adaround.rectified_sigmoid(a)) - 1) ** beta) for a in alphas)
        for alphas in [state.rounding.values()]
        for beta in (2 + 18 * (1 - (done - 5) / 5) for done in range(5, 10))
    ]
    np.testing.assert_allclose(penalty(4, 9), np.mean(expected), rtol=1e-4)


def test_whole_blocks_learn(run, sam):
    reports = []
    run(on_unit=reports.append, granularity="block", parts=("encoder_block",))
    learned = [r for r in reports if re.fullmatch(r"image_encoder/blocks_\d+", r.name)]
    assert len(learned) == sam.config.depth and all(r.after < r.before for r in learned)


# --- Resuming ---------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Stands for whatever ends a run."""


@pytest.mark.parametrize("done", [1, 6, 12])
def test_a_run_ended_after_a_unit_goes_on(run, finished, tmp_path, done):
    reports = []

    def stop(report):
        reports.append(report)
        if len(reports) == done:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path, stop)
    again: list[job.UnitReport] = []
    assert_same(run(tmp_path, again.append), finished[0])
    assert [r.seconds == 0 for r in again] == [True] * done + [False] * (len(again) - done)
    assert [(r.name, r.after) for r in again] == [(r.name, r.after) for r in finished[1]]
    assert len(list(tmp_path.iterdir())) == len(again)


@pytest.mark.parametrize("saves", [2, 9])
def test_a_run_ended_inside_a_unit_goes_on(run, finished, tmp_path, monkeypatch, saves):
    original, count = saved_state.save, 0

    def save(path: Path, identity: str, arrays) -> None:
        nonlocal count
        original(path, identity, arrays)
        count += 1
        if count == saves:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(saved_state, "save", save)
        with pytest.raises(Stop):
            run(tmp_path, save_seconds=0.0)
    assert list(tmp_path.glob("*.partial.npz"))
    assert_same(run(tmp_path), finished[0])
    assert not list(tmp_path.glob("*.partial.npz"))


def test_what_is_kept_on_disk_makes_no_difference(run):
    one = ("encoder_mlp",)  # its step is compiled anew for the shorter chunks from disk
    assert_same(run(parts=one, memory_budget=0), run(parts=one))


@pytest.fixture
def interrupted(run, tmp_path):
    """A state folder with its first unit done."""

    def stop(report):
        raise Stop

    with pytest.raises(Stop):
        run(tmp_path, stop)
    return tmp_path


@pytest.mark.parametrize("damage", ["cut", "empty", "byte", "other"])
def test_a_damaged_state_is_refused(run, interrupted, damage):
    (path,) = interrupted.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    elif damage == "byte":
        content[len(content) // 2] ^= 0x10
    else:
        content = bytearray(b"not an archive of arrays")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"attn\.done\.npz is damaged \(.*\); delete it"):
        run(interrupted)


def test_a_foreign_state_is_refused(run, interrupted):
    with pytest.raises(ValueError, match="other weights, images or settings"):
        run(interrupted, seed=1)


def test_a_state_of_other_code_is_refused(run, interrupted, monkeypatch):
    monkeypatch.setattr(saved_state, "code_version", lambda: "another")
    with pytest.raises(ValueError, match="or by other code"):
        run(interrupted)


def test_every_flipped_bit_of_an_archives_directory_gets_a_sentence(tmp_path):
    path = tmp_path / "state.npz"
    saved_state.save(path, "run", {"a": np.arange(4)})
    content = path.read_bytes()
    refused = 0
    for place in range(content.rindex(b"PK\x01\x02"), len(content)):
        for bit in range(8):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            try:
                arrays = saved_state.load(path, "run")
            except ValueError as error:
                assert "state.npz is damaged" in str(error) or "other code" in str(error)
                refused += 1
            else:
                # Dates, attributes and the like, of which nothing depends.
                assert arrays is not None and arrays["a"].tolist() == [0, 1, 2, 3]
    assert refused > 100


def test_a_damaged_intermediate_state_is_refused(run, tmp_path, monkeypatch):
    class Saved(Exception):
        pass

    def save(path: Path, identity: str, arrays) -> None:
        original(path, identity, arrays)
        raise Saved

    original = saved_state.save
    with monkeypatch.context() as patch:
        patch.setattr(saved_state, "save", save)
        with pytest.raises(Saved):
            run(tmp_path, save_seconds=0.0)
    (path,) = tmp_path.glob("*.partial.npz")
    with np.load(path) as file:
        arrays = dict(file)
    identity = str(arrays.pop("fingerprint"))
    name = max(arrays, key=lambda n: arrays[n].size)
    for changed in ({name: arrays[name].ravel()[1:]}, {name: arrays[name].astype(np.float64)}):
        original(path, identity, arrays | changed)
        with pytest.raises(ValueError, match="partial.npz is damaged .an array has a wrong shape"):
            run(tmp_path)
    original(path, identity, {n: a for n, a in arrays.items() if n != name})
    with pytest.raises(ValueError, match="is missing or not expected"):
        run(tmp_path)


def test_a_finished_unit_of_wrong_content_is_refused(run, interrupted):
    (path,) = interrupted.iterdir()
    with np.load(path) as file:
        arrays = dict(file)
    identity = str(arrays.pop("fingerprint"))
    codes = next(name for name in arrays if name.startswith("codes/"))
    scale = next(name for name in arrays if name.endswith("/scale"))
    for name, value, message in (
        (codes, arrays[codes][1:], "the codes of .* have a wrong shape"),
        (scale, -arrays[scale], "scale"),
        (scale, np.full_like(arrays[scale], np.nan), "scale"),
    ):
        saved_state.save(path, identity, arrays | {name: value})
        with pytest.raises(ValueError, match=f"attn.done.npz is damaged .*{message}"):
            run(interrupted)


def test_a_save_that_is_cut_off_leaves_the_old_state(tmp_path, monkeypatch):
    path = tmp_path / "state.npz"
    saved_state.save(path, "run", {"a": np.arange(4)})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            saved_state.save(path, "run", {"a": np.arange(9)})
    found = saved_state.load(path, "run")
    assert found is not None and found["a"].size == 4
    saved_state.save(path, "run", {"a": np.arange(9)})
    assert [p.name for p in tmp_path.iterdir()] == ["state.npz"]


def test_a_full_disk_gets_a_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        OSError, match="has no room for 96 bytes of a unit's inputs .No space left.*raise memory_budget"
    ):
        units.gather([(np.zeros((2, 3)),)] * 4, 4, 0, tmp_path)


_SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import numpy as np, test_reconstruct as t
from pathlib import Path
fixture = lambda f: f.__wrapped__ if hasattr(f, "__wrapped__") else f.__pytest_wrapped__.obj
sam = fixture(t.sam)(); params = fixture(t.params)(sam); images = fixture(t.images)(); boxes = fixture(t.boxes)()
config = t.dataclasses.replace(t.CONFIG, save_seconds=0.0)
calibrated = t.calibrate(sam, params, images, boxes)
print("ready", flush=True)
q = t.reconstruct(sam, params, calibrated, images, boxes, config, target=t.TARGET, state_dir=Path({state!r}))
np.savez({out!r}, **{{str(i): leaf for i, leaf in enumerate(t.jax.tree.leaves(q))}})
"""


@pytest.mark.slow
def test_a_killed_run_ends_the_same(finished, tmp_path):
    out, chance = tmp_path / "out.npz", random.Random(0)
    script = _SCRIPT.format(here=str(Path(__file__).parent), state=str(tmp_path / "state"), out=str(out))
    kills = 0
    while not out.exists():
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=dict(os.environ))
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        # A run with compiled programs takes about ten seconds: the first kills come within.
        limit = time.monotonic() + chance.uniform(0.2, 3 + kills)
        while process.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        process.stdout.close()
        assert process.returncode in (0, -signal.SIGKILL)
    assert kills > 0
    with np.load(out) as arrays:
        for i, leaf in enumerate(jax.tree.leaves(finished[0])):
            np.testing.assert_array_equal(arrays[str(i)], leaf)


# --- Refusals and methods ---------------------------------------------------------------------------------------------


def test_arguments_that_do_not_belong_together_are_refused(sam, params, calibrated, images, boxes):
    def start(params=params, images=images, boxes=boxes, target=TARGET):
        reconstruct(sam, params, calibrated, images, boxes, CONFIG, target=target)

    with pytest.raises(ValueError, match="2 sets of boxes"):
        start(boxes=boxes[:2])
    with pytest.raises(ValueError, match="different numbers of boxes"):
        start(boxes=[boxes[0][:1], *boxes[1:]])
    with pytest.raises(ValueError, match="another configuration"):
        start(target=dataclasses.replace(TARGET, a_bits=5))
    with pytest.raises(ValueError, match="not those that were quantized"):
        start(params=sam.init_params(jax.random.key(4)))
    for image in (np.zeros((32, 32, 3), np.uint8), images[0][:16], np.full_like(images[0], np.nan)):
        with pytest.raises(ValueError, match="Calibration image 1 is no canvas"):
            start(images=[images[0], image, images[2]])
    some = dataclasses.replace(calibrated, quant_config=dataclasses.replace(START, groups=4))
    for changes in ({"groups": 8}, {"groups": 0}, {"groups": 4, "group_metric": "paper"}):
        with pytest.raises(ValueError, match="calibrate with groups=0"):
            reconstruct(sam, params, some, images, boxes, CONFIG, target=dataclasses.replace(START, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 2e4}, "iterations=20000.0 must be a whole number"),
        ({"iterations": "200"}, "iterations='200' must be a whole number"),
        ({"learn_scales": 1}, "learn_scales=1 must be True or False"),
        ({"scale_rate": "fast"}, "scale_rate='fast' must be a number, or None"),
        ({"parts": "neck"}, "parts='neck' must be a tuple"),
        ({"granularity": "block", "parts": ("encoder_mlp",)}, "name encoder_block among the parts"),
        ({"parts": ("encoder_block",)}, "name encoder_attention or encoder_mlp among the parts"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ReconstructionConfig(**changes)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"params": {}}, "params must be the nested parameters of a SAM"), ({"calib": None}, "calib must be images")],
)
def test_the_whole_job_checks_its_arguments(sam, params, images, given, message):
    arguments = {"params": params, "calib": [np.zeros((8, 8, 3), np.uint8)]} | given
    with pytest.raises(ValueError, match=message):
        api.quantize_reconstructed(sam, **arguments, config=TARGET, reconstruction=CONFIG)


def test_a_finished_calibration_is_taken_over(sam, params, calibrated, tmp_path, monkeypatch):
    """What was saved is the calibration, bit by bit; a damaged or foreign one is refused."""
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    calls, seen, handed = [], [], []
    transformed = unflatten(flatten(params) | {"mask_decoder/iou_token": 2 * params["mask_decoder"]["iou_token"]})
    monkeypatch.setattr(
        api, "calibrate", lambda *_, **__: calls.append(1) or Calibrated(calibrated, transformed, transformed)
    )

    def reconstruct(sam, params, quantized, *_, **__):
        handed.append(params)
        seen.append(quantized)
        return quantized

    monkeypatch.setattr(api, "reconstruct", reconstruct)

    def start(calib):
        return api.quantize(params, calib, TARGET, sam=sam, reconstruction=CONFIG, state_dir=tmp_path, progress=False)

    tmp_path.mkdir(exist_ok=True)
    start([image])
    start([image])
    assert len(calls) == 1 and len(seen) == 2
    assert_same(seen[1], calibrated)
    # The parameters that reconstruction is handed are those after all transforms, from the folder, too.
    for found in handed:
        for (path, ours), theirs in zip(flatten(found).items(), flatten(transformed).values(), strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=path)
    with pytest.raises(ValueError, match="other weights, images or settings"):
        start([image[::-1]])
    (tmp_path / "calibrated.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="calibrated.npz is damaged"):
        start([image])


# --- Measurements, run by name with `-m slow -s` ----------------------------------------------------------------------


@pytest.mark.slow
def test_mini_gets_better(capsys, tmp_path):
    """W4A4 of MINI on 8 calibration scenes, few iterations: masks on 20 others agree more with floating point."""
    sam, params = load_sam("mini-scenes")
    size = sam.config.img_size
    calib = [(scene.image, scene.boxes) for scene in scenes.scene_dataset(scenes.CALIB_SEED, 8, size)]
    dataset = coco.CocoDataset.from_memory(*scenes.to_coco(scenes.scene_dataset(scenes.EVAL_SEED, 20, size)))
    prompts = coco.load_boxes("gt", dataset)
    config = QuantConfig()
    few = ReconstructionConfig(iterations=200)
    models = {"float": SamModel(sam, params)}
    reports: list[job.UnitReport] = []
    for name, changes in {"calibrated": {"parts": ()}, "reconstructed": {}}.items():
        began = time.perf_counter()
        models[name] = api.quantize_reconstructed(
            sam, params, calib, config, dataclasses.replace(few, **changes), on_unit=reports.append
        )
        with capsys.disabled():
            print(f"\n{name}: {time.perf_counter() - began:.0f} s")
    count = len(reports) // 2
    scores = {
        name: evaluate.evaluate(SamPredictor(model), dataset, prompts, progress=None) for name, model in models.items()
    }
    agreement = {name: evaluate.agreement_miou(scores["float"].images, s.images) for name, s in scores.items()}
    with capsys.disabled():
        for plain, learned in zip(reports[:count], reports[count:], strict=True):
            print(f"{plain.name:60} error {plain.after:9.4g} -> {learned.after:9.4g}, {learned.seconds:5.1f} s")
        for name, score in scores.items():
            print(f"{name}: AP {score.metrics['AP']:.1f}, mIoU {score.metrics['mIoU']:.4f}, {agreement[name]:.4f}")
    assert agreement["reconstructed"] > agreement["calibrated"]
