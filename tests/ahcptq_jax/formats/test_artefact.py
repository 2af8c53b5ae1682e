"""The artefact: what is saved is what is loaded, and nothing else is."""

import dataclasses
import hashlib
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import ahcptq_jax
from ahcptq_jax.architectures.sites import flatten, unflatten
from ahcptq_jax.formats import artefact
from ahcptq_jax.quantizers import Grouped, Hybrid, Log2, Uniform
from ahcptq_jax.runtime.quantized import Quantized, QuantizedWeight
from sam_flax import MINI_SCENES as MINI
from sam_flax import VIT_B, load_sam, save_params
from sam_flax.files.parameters import parameter_shapes
from sam_flax.sam import Sam


@pytest.fixture(scope="module")
def file(tiny_quantized, tmp_path_factory):
    """The model as a file."""
    path = tmp_path_factory.mktemp("artefact") / "model.safetensors"
    tiny_quantized.save(path)
    return path


@pytest.fixture(scope="module")
def blob(file):
    return file.read_bytes()


def same(first, second):
    """Whether two pytrees are equal in structure, types and every bit."""
    if jax.tree.structure(first) != jax.tree.structure(second):
        return False
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b) for a, b in pairs)


# --- Round trip -------------------------------------------------------------------------------------------------------


def test_what_quantize_returns_is_what_its_file_holds(tiny_quantized, file):
    """Every bit of it, the float remainder included."""
    assert same(ahcptq_jax.load(file, tiny_quantized.config), tiny_quantized)


def test_an_unknown_remainder_is_refused_before_the_work(sam_tiny):
    with pytest.raises(ValueError, match="remainder='fp8' must be 'fp16' or 'fp32'"):
        ahcptq_jax.quantize(sam_tiny[1], [], sam=Sam(sam_tiny[0]), remainder="fp8")


def unrounded(model):
    """The model with a float remainder that float16 cannot hold."""
    return dataclasses.replace(model, params=jax.tree.map(lambda a: a * 1.0001 + 1e-5, model.params))


def test_a_remainder_that_float16_cannot_hold_is_kept_in_float32(tiny_quantized, file, tmp_path):
    model = unrounded(tiny_quantized)
    model.save(tmp_path / "model")
    assert same(ahcptq_jax.load(tmp_path / "model"), model)
    assert (tmp_path / "model").stat().st_size > file.stat().st_size


def test_rounding_the_remainder_changes_nothing_else_and_is_done_once(tiny_quantized):
    model = unrounded(tiny_quantized)
    rounded = model.with_rounded_remainder()
    assert same((rounded.weights, rounded.activations), (model.weights, model.activations))
    expected = jax.tree.map(lambda a: jnp.asarray(a, jnp.float16).astype(jnp.float32), model.params)
    assert same(rounded.params, expected) and not same(rounded.params, model.params)
    assert same(rounded.with_rounded_remainder(), rounded)
    large = dataclasses.replace(model, params=jax.tree.map(lambda a: a + 1e6, model.params))
    assert same(large.with_rounded_remainder(), large), "beyond float16's range"


def test_provenance_is_free_and_nothing_depends_on_it(tiny_quantized, file, blob, tmp_path):
    assert artefact.read_provenance(file)["quant_config"]["a_bits"] == 4
    artefact.save(tiny_quantized, tmp_path / "f", provenance={"method": "mine", "notes": [1, {"a": None}]})
    assert artefact.read_provenance(tmp_path / "f")["notes"] == [1, {"a": None}]
    loaded = ahcptq_jax.load(tmp_path / "f")
    assert same(loaded, tiny_quantized) and loaded.quant_config == tiny_quantized.quant_config
    for change in (
        lambda h, m, d: m.pop("provenance"),
        lambda h, m, d: m.update(provenance={}),
        lambda h, m, d: m["provenance"].update(quant_config=3),
        lambda h, m, d: m["provenance"]["quant_config"].update(speed=1, a_bits=99, seed="x"),
    ):
        (tmp_path / "f").write_bytes(rebuilt(blob, change))
        assert same(jax.tree.leaves(ahcptq_jax.load(tmp_path / "f")), jax.tree.leaves(tiny_quantized))


def test_files_of_version_1_still_load(data_dir, tiny_quantized, tmp_path):
    """`data/quantized_v1.safetensors` was written by the last version of the package that wrote version 1."""
    old = ahcptq_jax.load(data_dir / "quantized_v1.safetensors")
    assert artefact.read_provenance(data_dir / "quantized_v1.safetensors")["quant_config"]["groups"] == 4
    # There was no grid then.
    assert old.quant_config == dataclasses.replace(ahcptq_jax.W4A4, grid_bits=0)
    assert old.config == tiny_quantized.config
    assert jax.tree.structure(old.weights) == jax.tree.structure(tiny_quantized.weights)
    assert {site: type(q) for site, q in old.activations.items()} == {
        site: type(q) for site, q in tiny_quantized.activations.items()
    }
    old.save(tmp_path / "new")
    assert same(ahcptq_jax.load(tmp_path / "new"), old)


def test_equal_models_are_equal_files_and_saving_replaces(file, tmp_path, blob):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    ahcptq_jax.load(file).save(path)
    assert path.read_bytes() == blob
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def all_kinds(sam_tiny, bits):
    """A model whose weights and quantizers have `bits` bits and odd numbers, every layout of a quantizer among them."""
    config, params = sam_tiny
    flat = {k: np.asarray(v) for k, v in flatten(params).items()}
    rng = np.random.default_rng(bits)
    weights, activations = {}, {}
    for site, channels in artefact.quantizable_sites(config, parameter_shapes(config)).items():
        scale, zero = jnp.float32(rng.uniform(0.01, 1)), jnp.float32(rng.integers(0, 2**bits))
        if site.endswith("/softmax"):
            activations[site] = Log2(scale, jnp.int32(rng.choice([1, 2, 4])), bits)
        elif site.endswith("lin2/input"):
            activations[site] = Hybrid(-scale, scale, scale / 3, jnp.float32(2 ** (bits - 1)), bits)
        elif site.endswith(("qkv/input", "q_proj/input")):
            labels = jnp.asarray(rng.integers(0, 3, channels), jnp.int32)
            activations[site] = Grouped(jnp.full(3, scale), jnp.full(3, zero), labels, bits)
        elif site.endswith("lin1/input"):  # a scale for every channel
            activations[site] = Uniform(jnp.full(channels, scale), jnp.full(channels, zero), bits)
        else:
            activations[site] = Uniform(scale, zero, bits)
        if site.endswith("/input"):
            layer = site.removesuffix("/input")
            shape = flat.pop(f"{layer}/kernel").shape
            codes = jnp.asarray(rng.integers(0, 2**bits, shape))
            scales = jnp.asarray(rng.uniform(0.01, 1, shape[-1]), jnp.float32)
            zeros = jnp.asarray(rng.integers(0, 2**bits, shape[-1]), jnp.float32)
            weights[layer] = QuantizedWeight.from_codes(codes, scales, zeros, bits)
    params = unflatten({k: jnp.asarray(v) for k, v in flat.items()})
    quant_config = ahcptq_jax.QuantConfig(w_bits=bits, a_bits=bits, seed=5, cag=False)
    return Quantized(params, weights, activations, Sam(config), quant_config)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_and_kind_survives(sam_tiny, bits, tmp_path):
    model = all_kinds(sam_tiny, bits)
    model.save(tmp_path / "model")
    loaded = ahcptq_jax.load(tmp_path / "model")
    assert same(loaded, model) and loaded.quant_config == model.quant_config
    with safe_open(tmp_path / "model", "np") as file:  # any reader of safetensors reads it
        names = [name for name in file.keys() if name.endswith("/codes")]
        for name in names:
            layer = name.removeprefix("weights/").removesuffix("/codes")
            stored = file.get_tensor(name)
            assert stored.dtype == np.uint8 and stored.nbytes == -(-np.prod(model.weights[layer].shape) * bits // 8)
    assert len(names) == len(model.weights)


# --- Sizes ------------------------------------------------------------------------------------------------------------


def share_of_float32(config, w_bits, remainder):
    """Bytes of an artefact over those of float32 parameters, from shapes alone."""
    shapes = parameter_shapes(config)
    original = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    sites = artefact.quantizable_sites(config, shapes)
    weights, activations = {}, {}
    for site, channels in sites.items():
        if site.endswith("/input"):
            layer = site.removesuffix("/input")
            shape = shapes.pop(f"{layer}/kernel")
            out, size = shape[-1], (int(np.prod(shape)) * w_bits + 7) // 8
            weights[layer] = QuantizedWeight(np.zeros(size, np.uint8), np.ones(out), np.zeros(out), shape, w_bits)
            activations[site] = Grouped(np.ones(4), np.zeros(4), np.zeros(channels, int), 4)
        else:
            activations[site] = Log2(1.0, 1, 4)
    value = np.float32({"fp16": 1.0, "fp32": 1.0001}[remainder])
    params = unflatten({k: np.full(v, value) for k, v in shapes.items()})
    model = Quantized(params, weights, activations, Sam(config), ahcptq_jax.W4A4)
    tensors = artefact.tensors_of(model)
    header = artefact.header_bytes(model, tensors, checksums=False)
    return (len(header) + sum(t.nbytes for t in tensors.values())) / original


def test_sizes():
    """As the README has them."""
    assert share_of_float32(VIT_B, 4, "fp16") == pytest.approx(0.1458, abs=5e-4)
    assert share_of_float32(VIT_B, 4, "fp32") == pytest.approx(0.1710, abs=5e-4)
    assert share_of_float32(MINI, 4, "fp16") == pytest.approx(0.207, abs=3e-3)


# --- Refusals ---------------------------------------------------------------------------------------------------------


def rebuilt(blob, change):
    """The file after `change(header, metadata, data)`, with sound checksums: a forgery, not an accident."""
    length = struct.unpack("<Q", blob[:8])[0]
    header, data = json.loads(blob[8 : 8 + length]), bytearray(blob[8 + length :])
    metadata = {
        k: v if k in ("format", "architecture", "header_sha256") else json.loads(v)
        for k, v in header["__metadata__"].items()
    }
    change(header, metadata, data)
    spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    if isinstance(metadata.get("sha256"), list):
        metadata["sha256"] = [hashlib.sha256(data[slice(*span)]).hexdigest() for span in spans]
    metadata["header_sha256"] = "0" * 64
    header["__metadata__"] = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw = raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode(), 1)
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


def set_values(name, dtype, values):
    """A change that overwrites the first values of a tensor."""

    def change(header, metadata, data):
        start, _ = header[name]["data_offsets"]
        new = np.asarray(values, dtype).tobytes()
        data[start : start + len(new)] = new

    return change


def update(part, path, **values):
    def change(header, metadata, data):
        (metadata[part][path] if path else metadata[part]).update(values)

    return change


def rename(old, new):
    def change(header, metadata, data):
        entries = [(new if name == old else name, entry) for name, entry in header.items()]
        header.clear()
        header.update(entries)

    return change


QKV = "image_encoder/blocks_0/attn/qkv"
SOFTMAX = "image_encoder/blocks_0/attn/softmax"
FORGERIES = {
    "newer": (lambda h, m, d: m.update(version=3), "is of format version 3 and this package reads up to 2"),
    "version zero": (lambda h, m, d: m.update(version=0), "unknown format version 0"),
    "version text": (lambda h, m, d: m.update(version="new"), "header that cannot be read"),
    "other format": (lambda h, m, d: m.update(format="other"), "was not written by Quantized.save"),
    "no sums": (lambda h, m, d: m.pop("sha256"), "header that cannot be read"),
    "no model": (lambda h, m, d: m.pop("sam_config"), "no usable model configuration"),
    "deeper": (update("sam_config", "", depth=5, global_attn_indexes=[1, 4]), "does not hold"),
    "huge": (update("sam_config", "", depth=10**6, global_attn_indexes=[]), "more layers than its"),
    "wider": (update("sam_config", "", mlp_ratio=8.0), "does not have"),
    "provenance": (lambda h, m, d: m.update(provenance=[]), "header that cannot be read"),
    "weight kind": (update("weights", QKV, kind="ternary"), "of a kind that is not read here"),
    "unknown kind": (update("activations", SOFTMAX, kind="ternary"), "of the unknown kind ternary; register it"),
    "static field": (update("activations", SOFTMAX, grid_bits=9), "unsound quantizer"),
    "static type": (update("activations", SOFTMAX, grid_bits=0.5), "does not have"),
    "bits": (update("weights", QKV, bits=5), "does not hold"),
    "bits float": (update("weights", QKV, bits=4.0), "does not have"),
    "bits list": (update("activations", SOFTMAX, kind=[]), "does not have"),
    "bits many": (update("activations", SOFTMAX, bits=9), "unsound quantizer"),
    "kind": (update("activations", SOFTMAX, kind="hybrid"), "does not hold"),
    "grouped map": (update("activations", SOFTMAX, kind="grouped"), "which has none"),
    "layer": (lambda h, m, d: m["weights"].update(nothing=m["weights"].pop(QKV)), "that its model does not have"),
    "missing": (rename(f"weights/{QKV}/scale", "weights/x/scale"), f"does not hold weights/{QKV}/scale"),
    "more": (
        lambda h, m, d: h.update({"x": {"dtype": "U8", "shape": [0], "data_offsets": [len(d)] * 2}}),
        "holds x, which",
    ),
    "scale": (set_values(f"weights/{QKV}/scale", "<f4", [-1.0]), "unsound quantizer"),
    "scale nan": (set_values(f"weights/{QKV}/scale", "<f4", [np.nan]), "unsound quantizer"),
    "zero point": (set_values(f"weights/{QKV}/zero_point", "u1", [16]), "unsound quantizer"),
    "tau": (set_values(f"activations/{SOFTMAX}", "<f4", [1.0, 3.0]), "unsound quantizer"),
    "label": (set_values(f"activations/{QKV}/input/groups", "u1", [200]), "unsound quantizer"),
    "parameter": (set_values("params/mask_decoder/iou_token", "<f2", [np.inf]), "not finite"),
    "dtype": (lambda h, m, d: h["params/mask_decoder/iou_token"].update(dtype="I16"), "no readable type"),
    "shape": (lambda h, m, d: h["params/mask_decoder/iou_token"].update(shape=[-1, "a"]), "no readable type"),
    "offset": (lambda h, m, d: h["params/mask_decoder/iou_token"].update(data_offsets=[0, 2]), "where the tensor"),
}


def refusal(path, data):
    """The sentence with which a file is refused."""
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        ahcptq_jax.load(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"Quantized model {path} ") and sentence.endswith(".") and "\n" not in sentence
    return sentence


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_are_refused(name, blob, tmp_path):
    change, part = FORGERIES[name]
    assert part in refusal(tmp_path / "f", rebuilt(blob, change))


def test_an_unchanged_rebuilt_file_loads(blob, tiny_quantized, tmp_path):
    (tmp_path / "f").write_bytes(rebuilt(blob, lambda *parts: None))
    assert same(ahcptq_jax.load(tmp_path / "f"), tiny_quantized)


def test_damage_is_named(blob, tmp_path):
    length = struct.unpack("<Q", blob[:8])[0]
    path = tmp_path / "f"
    flipped = bytearray(blob)
    flipped[-1] ^= 1
    assert "checksum of" in refusal(path, flipped)
    flipped = bytearray(blob)
    flipped[8 + blob[8:].index(b'"version":"2"') + 11] ^= 2
    assert "checksum of its header" in refusal(path, flipped), "not a newer version"
    assert "truncated: it ends inside" in refusal(path, blob[: 8 + length + 5000])
    assert "truncated" in refusal(path, blob[: length // 2])
    assert "truncated" in refusal(path, b"")
    assert "1 bytes too many" in refusal(path, blob + b"\0")
    assert "not a file by Quantized.save" in refusal(path, b"\x89PNG\r\n\x1a\n" + bytes(100))


def test_files_of_others_are_refused(file, tmp_path, sam_tiny):
    path = tmp_path / "float.safetensors"
    save_params(path, sam_tiny[0], sam_tiny[1])
    assert "use sam_flax.load_sam" in refusal(path, path.read_bytes())
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ahcptq_jax.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        ahcptq_jax.load(tmp_path)
    with pytest.raises(ValueError, match=r"another model, with img_size=128 \(not 160\)"):
        ahcptq_jax.load(file, MINI)
    with pytest.raises(ValueError, match="quantized model; load it with ahcptq_jax.load"):
        load_sam(file)


def test_nothing_half_written(tiny_quantized, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="existing directory"):
        tiny_quantized.save(tmp_path / "none" / "model")
    infinite = jax.tree.map(lambda a: a * np.float32(np.inf), tiny_quantized.params)
    with pytest.raises(ValueError, match="not finite"):
        dataclasses.replace(tiny_quantized, params=infinite).save(tmp_path / "model")
    broken = tiny_quantized.activations | {SOFTMAX: Log2(jnp.float32(np.nan), jnp.int32(1), 4)}
    with pytest.raises(ValueError, match=f"Quantizer {SOFTMAX} is not sound"):
        dataclasses.replace(tiny_quantized, activations=broken).save(tmp_path / "model")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artefact.os, "replace", full)
    with pytest.raises(OSError, match="No space left on device"):
        tiny_quantized.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# --- Fuzzing ----------------------------------------------------------------------------------------------------------


def mutant(blob, rng):
    """A file with a few of its bytes changed, removed, repeated or moved."""
    data = bytearray(blob)
    header = 8 + struct.unpack("<Q", blob[:8])[0]
    for _ in range(int(rng.integers(1, 4))):
        # Half of the changes fall on the header, where more can go wrong.
        end = min(header, len(data)) if rng.random() < 0.5 else len(data)
        at, size = int(rng.integers(0, max(end, 1))), int(rng.integers(1, 64))
        match int(rng.integers(0, 6)):
            case 0:
                data[at : at + 1] = bytes([rng.integers(0, 256)])
            case 1:
                data[at : at + 1] = bytes([(data[at : at + 1] or b"\0")[0] ^ 1 << int(rng.integers(0, 8))])
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = data[at : at + size]
            case 4:
                data[at : at + size] = rng.bytes(size)
            case 5:
                del data[at:]
    return bytes(data)


def forge(rng):
    """A random change of what the header says, with sound checksums."""

    def change(header, metadata, data):
        part = [header, metadata, metadata["sam_config"], metadata["provenance"], metadata["weights"]]
        part = [*part, metadata["activations"]][int(rng.integers(0, 6))]
        key = str(rng.choice(sorted(part)))
        if isinstance(part[key], dict) and rng.random() < 0.7:
            part = part[key]
            key = str(rng.choice(sorted(part)))
        values = [None, True, 0, -1, 1, 7, 10**9, 10**30, 0.5, "", "x", [], [1], [0, 4], {}, {"a": 1}]
        if rng.random() < 0.2:
            del part[key]
        else:
            part[key] = values[int(rng.integers(0, len(values)))]

    return change


def check_refused_or_equal(blob, data, path, original):
    if data == blob:
        return
    path.write_bytes(data)
    try:
        loaded = ahcptq_jax.load(path)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        # Nothing detects a change that changes nothing, such as another order of equal things.
        assert same(loaded, original) and loaded.quant_config == original.quant_config


def fuzz(blob, original, folder, count):
    forged = 0
    for seed in range(count):
        rng = np.random.default_rng(seed)
        check_refused_or_equal(blob, mutant(blob, rng), folder / "f", original)
        try:
            data = rebuilt(blob, forge(rng))
        except (TypeError, KeyError, AttributeError):
            continue  # the forged header has no data offsets to take checksums of
        path, forged = folder / "f", forged + 1
        path.write_bytes(data)
        try:
            ahcptq_jax.load(path)
        except ValueError as error:
            assert "\n" not in str(error)
    assert forged >= count / 2, "most were read"


def test_mutated_files_are_refused(blob, tiny_quantized, tmp_path):
    fuzz(blob, tiny_quantized, tmp_path, 100)


@pytest.mark.slow
def test_many_mutated_files_are_refused(blob, tiny_quantized, tmp_path):
    fuzz(blob, tiny_quantized, tmp_path, 3000)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_every_byte_is_under_a_checksum(blob, tmp_path_factory, data):
    at = data.draw(st.integers(0, len(blob) - 1))
    changed = bytearray(blob)
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    refusal(tmp_path_factory.getbasetemp() / "flipped", changed)
