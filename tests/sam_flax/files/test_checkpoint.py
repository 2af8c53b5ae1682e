"""Our own files: exact both ways, whole or absent, and refused in one sentence where they do not fit; `load_sam`."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as to_safetensors

from sam_flax.config import SamConfig
from sam_flax.files import checkpoint
from sam_flax.files.checkpoint import load_params, load_sam, save_params
from sam_flax.files.convert import convert, export_state_dict
from sam_flax.files.trees import by_path


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_save_and_load(tiny_tree, tmp_path, dtype):
    config, params = tiny_tree
    path = tmp_path / "w.safetensors"
    save_params(path, config, params, dtype)
    again, read = load_params(path)
    assert again == config
    flat, read = by_path(params), by_path(read)
    assert flat.keys() == read.keys()
    for name, value in flat.items():
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], value.astype(dtype).astype(np.float32))
    first = path.read_bytes()
    save_params(path, config, params, dtype)
    assert path.read_bytes() == first  # equal models are equal files
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_failed_save_leaves_the_old_file(tiny_tree, tmp_path, monkeypatch):
    config, params = tiny_tree
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")

    def fail(*_args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_params(path, config, params)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_saving_what_does_not_fit(tiny_state, tiny_tree, tmp_path, refused):
    config, params = tiny_tree
    path = tmp_path / "w.safetensors"
    wider = SamConfig(**{**config.to_dict(), "decoder_mlp_dim": 65})
    refused(lambda: save_params(path, wider, params), "expected (32, 65), got (32, 64)")
    refused(lambda: save_params(path, config, {"params": params}), "missing", "unexpected")
    refused(lambda: save_params(path, config, params, "int8"), "int8")  # type: ignore[arg-type]
    refused(lambda: save_params(tmp_path / "no" / "w", config, params), "existing directory")
    params["mask_decoder"]["iou_token"][0, 0] = 1e6
    refused(lambda: save_params(path, config, params, "float16"), "mask_decoder/iou_token", "float16")
    del params["mask_decoder"]["iou_token"]
    refused(lambda: export_state_dict(params), "1 missing (mask_decoder/iou_token)")
    assert not path.exists()


def own_file(path: Path, tiny_tree, **metadata: str) -> Path:
    config, params = tiny_tree
    values = {"format": "sam_flax", "version": "1", "config": json.dumps(config.to_dict())} | metadata
    path.write_bytes(to_safetensors(by_path(params), values))
    return path


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"depth": 10**6}, "more layers"),
        ({"depth": 5}, "14 missing (image_encoder/blocks_4/"),
        ({"depth": 3}, "global_attn_indexes"),
        ({"depth": 4.0}, "depth"),
        ({"depth": True}, "depth"),
        ({"depth": -1}, "depth"),
        ({"num_heads": "4"}, "num_heads"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"embed_dim": 10**400}, "embed_dim"),
        ({"mlp_ratio": 1e300}, "mlp_ratio"),
        ({"num_heads": 8}, "expected (5, 8), got (5, 16)"),
        ({"window_size": 4}, "expected (7, 16), got (5, 16)"),
        ({"global_attn_indexes": [9]}, "global_attn_indexes"),
        ({"global_attn_indexes": 1}, "global_attn_indexes"),
        ({"pixel_mean": [1, 2]}, "pixel_mean"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_own_files_with_other_configurations(tiny_tree, tmp_path, changes, part, refused):
    text = json.dumps(tiny_tree[0].to_dict() | changes)
    path = own_file(tmp_path / "w.safetensors", tiny_tree, config=text)
    refused(lambda: load_params(path), str(path), part)


def test_own_files_with_other_metadata(tiny_state, tiny_tree, tmp_path, refused, tiny_pth):
    path = tmp_path / "w.safetensors"
    for text in ("", "{", "[]", "[" * 100_000, "{}", '{"depth": 1}'):
        refused(lambda text=text: load_params(own_file(path, tiny_tree, config=text)), str(path), "configuration")
    refused(lambda: load_params(own_file(path, tiny_tree, version="2")), "version '2'")
    path.write_bytes(to_safetensors(tiny_state, {"format": "pt"}))
    refused(lambda: load_params(path), "load_sam")
    refused(lambda: load_params(tiny_pth), "load_sam")


def test_load_sam(tiny_tree, tmp_path, refused, tiny_config, tiny_pth):
    jax = pytest.importorskip("jax")
    sam, params = load_sam(tiny_pth, decoder_num_heads=4)
    assert sam.config == tiny_config
    save_params(tmp_path / "own", *tiny_tree)
    own, same = load_sam(str(tmp_path / "own"))
    assert own.config == tiny_config
    assert jax.tree.all(jax.tree.map(lambda a, b: isinstance(a, jax.Array) and bool((a == b).all()), params, same))
    refused(lambda: load_sam(tmp_path / "own", decoder_num_heads=8), "decoder_num_heads=4, not 8")


def test_missing_packaged_weights(monkeypatch, tmp_path, refused):
    monkeypatch.setitem(checkpoint.PACKAGED, "mini", tmp_path / "mini.safetensors")
    refused(lambda: load_sam("mini"), "reinstall", error=FileNotFoundError)


# ---------------------------------------------------------------------------------------------------- fuzzing
flips = st.lists(st.tuples(st.integers(0, 1 << 24), st.integers(1, 255)), min_size=1, max_size=4)
quick = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def own_content(tiny_state, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "w.safetensors"
    save_params(path, *convert(tiny_state, decoder_num_heads=4), "float16")
    return path.read_bytes()


@quick
@given(changes=flips, keep=st.sampled_from([1.0, 1.0, 0.5]), header_only=st.booleans())
def test_fuzz_own_file(own_content, tmp_path, changes, keep, header_only, survives, damage):
    path = tmp_path / "w.safetensors"
    if header_only:
        size = 8 + struct.unpack("<Q", own_content[:8])[0]
        changes = [(position % size, mask) for position, mask in changes]
    path.write_bytes(damage(own_content, changes, keep))
    survives(path, load_params)
