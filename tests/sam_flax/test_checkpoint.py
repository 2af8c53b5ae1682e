"""Weights: golden files read exactly, names and layouts converted both ways, every bad file one sentence."""

import io
import json
import pickle
import re
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as to_safetensors

from sam_flax import checkpoint as ck
from sam_flax.config import VIT_B, VIT_H, VIT_L, SamConfig

DATA = Path(__file__).parents[1] / "data"
TINY_PTH = DATA / "sam_tiny_s0.pth"
TINY = SamConfig(
    img_size=128,
    patch_size=16,
    embed_dim=64,
    depth=4,
    num_heads=4,
    window_size=3,
    global_attn_indexes=(1, 3),
    out_chans=32,
    mask_in_chans=8,
    decoder_num_heads=4,
    decoder_mlp_dim=64,
    iou_head_hidden_dim=32,
)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(DATA / "sam_tiny_weights_s0.npz") as file:
        return dict(file)


@pytest.fixture
def tiny(golden):
    return ck.convert(golden, decoder_num_heads=4)


def refused(call, *parts: str, error: type[Exception] = ValueError) -> str:
    """The one sentence with which `call` fails, after checking that it holds `parts`."""
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error  # no subclass: not UnicodeDecodeError, not UnpicklingError
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 2500, message
    for part in parts:
        assert part in message, (part, message)
    return message


# A writer of torch.save's format, so that the tests need no PyTorch and can write what PyTorch would not.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def integers(values) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(key: str, array: np.ndarray, kind="FloatStorage", shape=None, stride=None, offset=0) -> bytes:
    shape = array.shape if shape is None else shape
    if stride is None:
        stride = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + integer(array.size)
    call = b"(" + storage + b"tQ" + integer(offset) + integers(shape) + integers(stride)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + call + b"\x89ccollections\nOrderedDict\n)RtR"


def mapping(items) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in items) + b"u"


def write_zip(path: Path, pickled: bytes, storages: dict[str, bytes], top="archive", **extra: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{top}/data.pkl", pickled)
        for key, raw in storages.items():
            archive.writestr(f"{top}/data/{key}", raw)
        for name, raw in extra.items():
            archive.writestr(f"{top}/{name}", raw)
    return path


def write_pth(path: Path, arrays: dict[str, np.ndarray], wrap: str | None = None) -> Path:
    body = mapping((name, tensor(str(i), array)) for i, (name, array) in enumerate(arrays.items()))
    if wrap is not None:
        body = mapping([("epoch", integer(3)), (wrap, body)])
    raw = {str(i): array.astype("<f4").tobytes() for i, array in enumerate(arrays.values())}
    return write_zip(path, b"\x80\x02" + body + b".", raw)


def one(path: Path, value: bytes, **storages: bytes) -> Path:
    """A file with the single entry "w"."""
    return write_zip(path, b"\x80\x02" + mapping([("w", value)]) + b".", storages)


W = np.arange(12, dtype=np.float32)


# ---------------------------------------------------------------------------------------------------- reading


def test_golden_pth_equals_golden_npz(golden):
    read = ck.read_state_dict(TINY_PTH)
    assert read.keys() == golden.keys()
    for name, value in golden.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value)


def test_content_decides_not_extension(golden, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(TINY_PTH.read_bytes())
    np.testing.assert_array_equal(
        ck.read_state_dict(path)["image_encoder.pos_embed"], golden["image_encoder.pos_embed"]
    )
    path = tmp_path / "weights.pth"
    path.write_bytes(to_safetensors(golden, {"format": "pt"}))
    config, _ = ck.convert(ck.read_state_dict(path), decoder_num_heads=4)
    assert config == TINY


@pytest.mark.parametrize("wrap", [None, "model", "state_dict", "model_state_dict"])
def test_wrapped_state_dicts(tmp_path, wrap):
    arrays = {"a": W.reshape(3, 4), "b": W[:5]}
    read = ck.read_state_dict(write_pth(tmp_path / "w.pth", arrays, wrap))
    assert read.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(read[name], value)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("FloatStorage", "f4"),
        ("DoubleStorage", "f8"),
        ("HalfStorage", "f2"),
        ("LongStorage", "i8"),
        ("IntStorage", "i4"),
        ("ShortStorage", "i2"),
        ("CharStorage", "i1"),
        ("ByteStorage", "u1"),
        ("BoolStorage", "?"),
    ],
)
@pytest.mark.parametrize("order", ["little", "big"])
def test_dtypes_and_byte_orders(tmp_path, kind, dtype, order):
    values = W.astype(dtype)
    raw = values.astype(values.dtype.newbyteorder(order)).tobytes()
    pickled = b"\x80\x02" + mapping([("w", tensor("0", values, kind))]) + b"."
    path = write_zip(tmp_path / "w.pth", pickled, {"0": raw}, byteorder=order.encode())
    read = ck.read_state_dict(path)["w"]
    assert read.dtype == values.dtype
    np.testing.assert_array_equal(read, values)


def test_bfloat16_is_widened_exactly(tmp_path):
    bits = (W.view(np.uint32) >> 16).astype("<u2")  # small integers are bfloat16 numbers
    path = one(tmp_path / "w.pth", tensor("0", W, "BFloat16Storage"), **{"0": bits.tobytes()})
    np.testing.assert_array_equal(ck.read_state_dict(path)["w"], W)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [12], "data_offsets": [0, 24]}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bits.tobytes())
    read = ck.read_state_dict(path)["w"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, W)


def test_strides_and_offsets(tmp_path):
    value = tensor("0", W, shape=(2, 3), stride=(1, 3), offset=2)
    read = ck.read_state_dict(one(tmp_path / "w.pth", value, **{"0": W.tobytes()}))["w"]
    np.testing.assert_array_equal(read, [[2, 5, 8], [3, 6, 9]])


def test_protocol_4_parameters_and_metadata(tmp_path):
    """STACK_GLOBAL, memo, frames, nn.Parameter and an OrderedDict with attributes."""
    name = b"\x8c\x0ctorch._utils\x8c\x12_rebuild_parameter\x93"
    parameter = name + b"(" + tensor("0", W) + b"\x88ccollections\nOrderedDict\n)RtR"
    body = b"\x8c\x0bcollections\x8c\x0bOrderedDict\x93)R\x94\x8c\x01w" + parameter + b"s"
    state = b"}" + text("_metadata") + b"}s"
    pickled = b"\x80\x04\x95" + struct.pack("<Q", 9) + body + state + b"b0h\x00."
    read = ck.read_state_dict(write_zip(tmp_path / "w.pth", pickled, {"0": W.tobytes()}))
    np.testing.assert_array_equal(read["w"], W)


# ------------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "sam.", "module.sam_model."])
def test_round_trip_is_exact(golden, prefix):
    config, params = ck.convert({prefix + k: v for k, v in golden.items()}, decoder_num_heads=4)
    assert config == TINY
    exported = ck.export_state_dict(params)
    assert exported.keys() == golden.keys()
    for name, value in golden.items():
        assert exported[name].dtype == np.float32 and exported[name].flags.c_contiguous
        np.testing.assert_array_equal(exported[name], value)


def test_layouts(golden, tiny):
    params = tiny[1]
    encoder, decoder = params["image_encoder"], params["mask_decoder"]
    np.testing.assert_array_equal(
        encoder["patch_embed"]["proj"]["kernel"][3, 5, 1, 7],
        golden["image_encoder.patch_embed.proj.weight"][7, 1, 3, 5],
    )
    np.testing.assert_array_equal(
        encoder["blocks_2"]["attn"]["qkv"]["kernel"], golden["image_encoder.blocks.2.attn.qkv.weight"].T
    )
    np.testing.assert_array_equal(
        decoder["output_upscaling"]["conv1"]["kernel"][0, 1, 5, 3],
        golden["mask_decoder.output_upscaling.0.weight"][5, 3, 0, 1],
    )
    np.testing.assert_array_equal(
        params["prompt_encoder"]["point_embeddings"][2], golden["prompt_encoder.point_embeddings.2.weight"][0]
    )


def test_result_does_not_alias_its_source(golden):
    source = {name: value.copy() for name, value in golden.items()}
    _, params = ck.convert(source, decoder_num_heads=4)
    params["image_encoder"]["pos_embed"][:] = 7
    ck.export_state_dict(params)["image_encoder.pos_embed"][:] = 8
    np.testing.assert_array_equal(source["image_encoder.pos_embed"], golden["image_encoder.pos_embed"])
    assert (params["image_encoder"]["pos_embed"] == 7).all()


def test_tree_is_the_modules_tree(tiny):
    jax = pytest.importorskip("jax")
    from sam_flax.sam import Sam

    config, params = tiny
    expected = jax.eval_shape(Sam(config).init_params, jax.random.key(0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)


@pytest.mark.parametrize("base", [VIT_B, VIT_L, VIT_H], ids=["vit_b", "vit_l", "vit_h"])
def test_published_configurations_are_inferred_from_shapes(base):
    state = {
        name: np.broadcast_to(np.float32(0), entry.official_shape())
        for entry in ck._table(ck._Dims.from_config(base))
        for name in entry.official
    }
    assert ck.infer_config(state) == base
    assert len(state) == {12: 314, 24: 482, 32: 594}[base.depth]  # as the published files have


def test_infer_config_reads_trees_too(tiny):
    assert ck.infer_config(tiny[1], decoder_num_heads=4) == TINY


def test_window_as_large_as_the_grid_reads_as_global(golden):
    state = dict(golden)
    for i, axis in ((0, "h"), (0, "w"), (2, "h"), (2, "w")):
        state[f"image_encoder.blocks.{i}.attn.rel_pos_{axis}"] = np.zeros((15, 16), np.float32)
    config = ck.infer_config(state, decoder_num_heads=4)
    assert config.global_attn_indexes == (0, 1, 2, 3) and config.window_size == config.grid == 8


def test_unknown_decoder_heads_are_said(golden):
    with pytest.warns(UserWarning, match="pass decoder_num_heads"):
        assert ck.convert(golden)[0].decoder_num_heads == 8


def test_pixel_statistics_go_into_the_configuration(golden):
    extra = {
        "pixel_mean": np.array([[[1.5]], [[2.5]], [[123.675]]], np.float32),
        "pixel_std": np.array([1, 2, 3], np.float32),
    }
    config, _ = ck.convert(golden | extra, decoder_num_heads=4)
    assert config.pixel_mean == (1.5, 2.5, 123.675) and config.pixel_std == (1, 2, 3)


def to_hugging_face(name: str) -> str:
    """Meta's name -> the name in transformers' SamModel (its convert_sam_to_hf.py says the same)."""
    name = re.sub(r"layers\.0\.(weight|bias)$", r"proj_in.\1", name) if "_head" in name or "mlps" in name else name
    if "_head" in name or "mlps" in name:
        name = re.sub(r"layers\.1\.(weight|bias)$", r"layers.0.\1", name)
        name = re.sub(r"layers\.2\.(weight|bias)$", r"proj_out.\1", name)
    for old, new in {
        "pe_layer.positional_encoding_gaussian_matrix": "shared_embedding.positional_embedding",
        "patch_embed.proj": "patch_embed.projection",
        "image_encoder.blocks": "image_encoder.layers",
        "point_embeddings": "point_embed",
        "mask_downscaling.0": "mask_embed.conv1",
        "mask_downscaling.1": "mask_embed.layer_norm1",
        "mask_downscaling.3": "mask_embed.conv2",
        "mask_downscaling.4": "mask_embed.layer_norm2",
        "mask_downscaling.6": "mask_embed.conv3",
        "output_upscaling.0": "upscale_conv1",
        "output_upscaling.1": "upscale_layer_norm",
        "output_upscaling.3": "upscale_conv2",
        "neck.0": "neck.conv1",
        "neck.1": "neck.layer_norm1",
        "neck.2": "neck.conv2",
        "neck.3": "neck.layer_norm2",
        ".norm": ".layer_norm",
        "image_encoder": "vision_encoder",
    }.items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("tied", ["both", "shared_image_embedding", "prompt_encoder"])
def test_hugging_face_names(golden, tied):
    state = {to_hugging_face(k): v for k, v in golden.items()}
    prompt, image = ck._HF_POSITIONS
    state[image] = state[prompt]
    if tied == "shared_image_embedding":
        del state[prompt]
    elif tied == "prompt_encoder":
        del state[image]
    config, params = ck.convert(state, decoder_num_heads=4)
    assert config == TINY
    exported = ck.export_state_dict(params)
    assert exported.keys() == golden.keys()
    for name, value in golden.items():
        np.testing.assert_array_equal(exported[name], value)


def test_hugging_face_tied_values_must_agree(golden):
    state = {to_hugging_face(k): v for k, v in golden.items()}
    state[ck._HF_POSITIONS[1]] = state[ck._HF_POSITIONS[0]] + 1
    refused(lambda: ck.convert(state), *ck._HF_POSITIONS)


def test_transformers_own_files(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the `parity` extra (transformers, torch)")
    torch = pytest.importorskip("torch", reason="needs the `parity` extra (transformers, torch)")
    model = transformers.SamModel(
        transformers.SamConfig(
            vision_config=transformers.SamVisionConfig(
                hidden_size=32,
                output_channels=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=64,
                patch_size=8,
                window_size=3,
                global_attn_indexes=[2],
                num_pos_feats=16,
                mlp_dim=96,
            ),
            prompt_encoder_config=transformers.SamPromptEncoderConfig(
                hidden_size=32, image_size=64, patch_size=8, mask_input_channels=8
            ),
            mask_decoder_config=transformers.SamMaskDecoderConfig(
                hidden_size=32, mlp_dim=48, num_attention_heads=4, iou_head_hidden_dim=24
            ),
        )
    )
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    expected = SamConfig(
        img_size=64,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=2,
        window_size=3,
        global_attn_indexes=(2,),
        mlp_ratio=3.0,
        out_chans=32,
        mask_in_chans=8,
        decoder_num_heads=4,
        decoder_mlp_dim=48,
        iou_head_hidden_dim=24,
    )
    for name in ("model.safetensors", "model.pth"):
        config, params = ck.convert(ck.read_state_dict(tmp_path / name), decoder_num_heads=4)
        assert config == expected
        ours = ck.export_state_dict(params)
        for meta, value in ours.items():
            np.testing.assert_array_equal(value, model.state_dict()[to_hugging_face(meta)].numpy())


# -------------------------------------------------------------------------------- state dicts that do not fit


def test_missing_and_unexpected_names_are_listed_both_ways(golden):
    state = {k: v for k, v in golden.items() if "blocks.1.mlp" not in k and "no_mask" not in k}
    state |= {f"mask_decoder.hf_mlp.{i}.weight": W for i in range(10)}
    message = refused(
        lambda: ck.convert(state, source="Checkpoint x.pth"),
        "Checkpoint x.pth",
        "5 missing",
        "image_encoder.blocks.1.mlp.lin1.weight",
        "prompt_encoder.no_mask_embed.weight",
        "10 unexpected",
        "and 2 more",
    )
    assert message.count("hf_mlp") == 8


def test_absurd_index_is_one_unexpected_name(golden):
    state = golden | {"image_encoder.blocks.999999999999.norm1.weight": W}
    refused(lambda: ck.convert(state), "1 unexpected", "14 missing (image_encoder.blocks.4.")


def test_not_a_sam(golden):
    refused(lambda: ck.convert({"conv1.weight": W, "fc.bias": W}), "is not a SAM", "conv1.weight")
    refused(lambda: ck.convert({}), "is not a SAM")
    refused(lambda: ck.convert({"image_encoder.x\n\x1b[31m": W}), "unexpected")
    prefixed = {"module." + k: v for k, v in golden.items()}
    name = "prompt_encoder.no_mask_embed.weight"
    refused(lambda: ck.convert(prefixed | {name: golden[name]}), name, "twice", "'module.'")


@pytest.mark.filterwarnings("ignore:State dict does not say how many heads")
def test_wrong_shapes_are_named(golden):
    name = "mask_decoder.transformer.layers.1.mlp.lin2.weight"
    refused(lambda: ck.convert(golden | {name: golden[name].T}), name, "(32, 64)", "(64, 32)")
    refused(lambda: ck.convert(golden | {name: W}), name, "(12,)")
    refused(lambda: ck.convert(golden | {name: np.zeros((0, 64), np.float32)}), name, "(0, 64)")
    name = "image_encoder.blocks.2.attn.rel_pos_h"
    refused(lambda: ck.convert(golden | {name: np.zeros((9, 16), np.float32)}), "[5, 9, 15]", "8x8")
    name = "image_encoder.blocks.0.attn.rel_pos_h"
    refused(lambda: ck.convert(golden | {name: np.zeros((5, 17), np.float32)}), "17", "64")
    for heads in (5, 0, -4):
        refused(lambda heads=heads: ck.convert(golden, decoder_num_heads=heads), "decoder_num_heads")
    refused(lambda: ck.convert(golden | {"pixel_mean": W}), "pixel_mean")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_not_finite_are_named(golden, bad):
    name = "mask_decoder.iou_token.weight"
    value = golden[name].astype(np.float64)
    value[0, 3] = bad
    refused(lambda: ck.convert(golden | {name: value}, decoder_num_heads=4), name)
    refused(lambda: ck.convert(golden | {name: value.astype(complex)}, decoder_num_heads=4), name, "complex")


# ------------------------------------------------------------------------------------- files that are refused

PLAIN = {
    "empty file": (b"", "is empty"),
    "JPEG": (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + bytes(80), "neither"),
    "text": (b"<html>404 not found</html>" * 9, "neither"),
    "one byte": (b"P", "neither"),
    "pickle": (pickle.dumps({"w": [1.0, 2.0]}), "bare pickle"),
    "legacy torch": (bytes.fromhex("80028a0a6cfc9c46f9206aa850192e") + bytes(50), "before PyTorch 1.6"),
    "zip magic only": (b"PK\x03\x04" + bytes(40), "zip archive"),
    "safetensors header too long": (struct.pack("<Q", 1 << 40) + b"{}" + bytes(9), "header"),
    "safetensors header cut": (struct.pack("<Q", 500) + b'{"w": {"dtype"', "truncated"),
    "safetensors header damaged": (struct.pack("<Q", 12) + b'{"w": [1,2}]', "sound safetensors"),
    "safetensors nested": (struct.pack("<Q", 200006) + b'{"w": ' + b"[" * 200000, "sound safetensors"),
}


@pytest.mark.parametrize("case", PLAIN)
def test_files_of_other_kinds(tmp_path, case):
    content, part = PLAIN[case]
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    refused(lambda: ck.read_state_dict(path), str(path), part)
    refused(lambda: ck.load_params(path), str(path))
    refused(lambda: ck.load_sam(path), str(path), part)


def test_missing_file_and_directory(tmp_path):
    for read in (ck.read_state_dict, ck.load_params, ck.load_sam):
        refused(lambda read=read: read(tmp_path / "no.pth"), "no.pth", "does not exist", error=FileNotFoundError)
        refused(lambda read=read: read(tmp_path), str(tmp_path), "directory")


class Harm:
    """What an attacker would put in a checkpoint."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_malicious_pickles_run_nothing(tmp_path, protocol):
    import os

    target = tmp_path / "harmed"
    for harm in (
        Harm(os.system, f"touch {target}"),
        Harm(eval, f"open({str(target)!r}, 'w')"),
        Harm(exec, f"open({str(target)!r}, 'w')"),
        Harm(getattr, os, "system"),
        Harm(pickle.loads, pickle.dumps(Harm(os.system, f"touch {target}"))),
    ):
        if harm.call[0] is getattr:
            pickled = b"\x80\x02cbuiltins\ngetattr\n(cos\n__dict__\n" + text("system") + b"tR."
        else:
            pickled = pickle.dumps({"w": harm}, protocol)
        path = write_zip(tmp_path / "w.pth", pickled, {"0": W.tobytes()})
        refused(lambda path=path: ck.read_state_dict(path), "w.pth", "re-save" if protocol > 1 else "w.pth")
        assert not target.exists()


@pytest.mark.parametrize(
    "name",
    [
        "os\nsystem",
        "posix\nsystem",
        "builtins\neval",
        "builtins\ngetattr",
        "__builtin__\neval",
        "torch.storage\n_load_from_bytes",
        "torch\nload",
        "torch\n_utils.os.system",
        "collections\nOrderedDict.__init__",
        "torch._utils\n_rebuild_tensor_v2.__globals__",
        "numpy.core.multiarray\n_reconstruct",
    ],
)
def test_only_tensor_names_are_known(tmp_path, name):
    pickled = b"\x80\x02c" + name.encode() + b"\n(" + text("touch x") + b"tR."
    path = write_zip(tmp_path / "w.pth", pickled, {})
    refused(lambda: ck.read_state_dict(path), name.replace("\n", "."), "nothing was run")
    module, attribute = name.split("\n")
    pickled = b"\x80\x04" + text(module) + text(attribute) + b"\x93(" + text("touch x") + b"tR."
    path = write_zip(tmp_path / "w.pth", pickled, {})
    refused(lambda: ck.read_state_dict(path), name.replace("\n", "."), "nothing was run")


def large_memo() -> bytes:
    return b"\x80\x02}r\xff\xff\xff\xff."  # pickle.Unpickler allocates 32 GiB for this


PICKLES = {
    "empty": (b"", "ends early"),
    "no stop": (b"\x80\x02}", "ends early"),
    "empty stack": (b"\x80\x02.", "stack"),
    "protocol": (b"\x80\x09}.", "protocol"),
    "unset memo": (b"\x80\x02h\x07.", "memo 7"),
    "no mark": (b"\x80\x02}u.", "mark"),
    "mark as value": (b"\x80\x02(.", "stack"),
    "odd items": (b"\x80\x02}(Nu.", "no value"),
    "append to dict": (b"\x80\x02}Na.", "list is missing"),
    "tuple as key": (b"\x80\x02})Ns.", "key"),
    "endless name": (b"\x80\x02c" + b"a" * 1000, "name does not end"),
    "name not text": (b"\x80\x02c\xff\xfe\nx\n.", "UTF-8"),
    "stack global of numbers": (b"\x80\x04K\x01K\x02\x93.", "not text"),
    "new object opcode": (b"\x80\x02)\x81.", "opcode"),
    "extension opcode": (b"\x80\x02\x82\x01.", "opcode"),
    "bad call": (b"\x80\x02ccollections\nOrderedDict\nNR.", "call"),
    "bad storage": (b"\x80\x02NQ.", "storage"),
    "bad tensor": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NNNNtR.", "tensor"),
    "large memo": (large_memo(), "empty state dict"),
    "deep nesting": (b"\x80\x02" + b"]" + b"\x85" * 200_000 + b".", "tuple"),
    "list": (b"\x80\x02].", "list where a state dict belongs"),
    "empty dict": (b"\x80\x02}.", "empty state dict"),
    "value not a tensor": (b"\x80\x02" + mapping([("w", b"K\x03")]) + b".", "'w'"),
    "key not a name": (b"\x80\x02}K\x01K\x02s.", "int"),
    "same key twice": (b"\x80\x02" + mapping([("w", b"N"), ("w", b"N")]) + b".", "'w' twice"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_damaged_pickles(tmp_path, case):
    pickled, part = PICKLES[case]
    path = write_zip(tmp_path / "w.pth", pickled, {})
    refused(lambda: ck.read_state_dict(path), str(path), part)


TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "out of bounds": (dict(shape=(13,)), "outside its storage"),
    "offset out of bounds": (dict(shape=(12,), offset=1), "outside its storage"),
    "stride out of bounds": (dict(shape=(2,), stride=(12,)), "outside its storage"),
    "negative stride": (dict(shape=(2,), stride=(-1,)), "malformed"),
    "negative size": (dict(shape=(-2, -2), stride=(1, 1)), "malformed"),
    "negative offset": (dict(offset=-4, shape=(2,)), "malformed"),
    "expanded bomb": (dict(shape=(1 << 20, 1 << 20), stride=(0, 0)), "outside its storage"),
    "absurd rank": (dict(shape=(1,) * 40), "malformed"),
    "ranks differ": (dict(shape=(2, 2), stride=(1,)), "malformed"),
    "storage too short": (dict(kind="DoubleStorage"), "48 bytes"),
    "unknown storage": (dict(kind="QInt8Storage"), "torch.QInt8Storage"),
    "not a storage": (dict(kind="float32"), "storage"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_out_of_bounds(tmp_path, case):
    changes, part = TENSORS[case]
    path = one(tmp_path / "w.pth", tensor("0", W, **changes), **{"0": W.tobytes()})
    refused(lambda: ck.read_state_dict(path), str(path), part)


def test_missing_storage(tmp_path):
    path = one(tmp_path / "w.pth", tensor("../../etc/passwd", W), **{"0": W.tobytes()})
    refused(lambda: ck.read_state_dict(path), "lacks the data")


def test_bad_archives(tmp_path):
    path = tmp_path / "w.pth"
    whole = TINY_PTH.read_bytes()
    for cut in (30, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(lambda: ck.read_state_dict(path), str(path), "download or copy it again")
    at = whole.index(b"data/1") + 1000  # inside a storage
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    refused(lambda: ck.read_state_dict(path), "CRC")

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(lambda: ck.read_state_dict(path), "not one that torch.save wrote")

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:  # 64 MB of zeros in 64 kB
        archive.writestr("archive/data.pkl", bytes(64 << 20))
    refused(lambda: ck.read_state_dict(path), "compresses")

    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    refused(lambda: ck.read_state_dict(path), "twice")

    write_zip(path, bytes(9 << 20), {})
    refused(lambda: ck.read_state_dict(path), "over the limit")


def test_overlapping_records_are_refused(tmp_path):
    """A bomb without compression: many directory entries that share one record's bytes."""
    path = one(tmp_path / "w.pth", tensor("0", W), **{"0": bytes(4096)})
    content = path.read_bytes()
    end = content.rindex(b"PK\x05\x06")
    start = struct.unpack("<I", content[end + 16 : end + 20])[0]
    entry = content[content.rindex(b"PK\x01\x02") : end]
    copies = b"".join(entry.replace(b"data/0", b"data/" + bytes([c])) for c in b"abcdefgh")
    directory = content[start:end] + copies
    count = struct.unpack("<H", content[end + 10 : end + 12])[0] + 8
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(directory), start, 0)
    path.write_bytes(content[:start] + directory + tail)
    refused(lambda: ck.read_state_dict(path), "declares")


def safetensors_file(path: Path, header: str, data: bytes) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)
    return path


def test_bad_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    entry = '"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    safetensors_file(path, f"{{{entry},{entry}}}", bytes(8))
    refused(lambda: ck.read_state_dict(path), str(path), "'w' appears twice")
    safetensors_file(path, f"{{{entry}}}", bytes(7))
    refused(lambda: ck.read_state_dict(path), str(path), "sound safetensors")
    safetensors_file(path, f"{{{entry.replace('[2]', '[99999999999]')}}}", bytes(8))
    refused(lambda: ck.read_state_dict(path), str(path), "sound safetensors")
    safetensors_file(path, f"{{{entry.replace('F32', 'F8_E4M3').replace('[2]', '[8]')}}}", bytes(8))
    refused(lambda: ck.read_state_dict(path), str(path), "F8_E4M3")


# ---------------------------------------------------------------------------------------------- our own files


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_save_and_load(tiny, tmp_path, dtype):
    config, params = tiny
    path = tmp_path / "w.safetensors"
    ck.save_params(path, config, params, dtype)
    again, read = ck.load_params(path)
    assert again == config
    flat, read = ck._flatten(params), ck._flatten(read)
    assert flat.keys() == read.keys()
    for name, value in flat.items():
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], value.astype(dtype).astype(np.float32))
    first = path.read_bytes()
    ck.save_params(path, config, params, dtype)
    assert path.read_bytes() == first  # equal models are equal files
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_failed_save_leaves_the_old_file(tiny, tmp_path, monkeypatch):
    config, params = tiny
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")

    def fail(*_args):
        raise OSError("disk full")

    monkeypatch.setattr(ck.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        ck.save_params(path, config, params)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_saving_what_does_not_fit(golden, tiny, tmp_path):
    config, params = tiny
    path = tmp_path / "w.safetensors"
    wider = SamConfig(**{**config.to_dict(), "decoder_mlp_dim": 65})
    refused(lambda: ck.save_params(path, wider, params), "expected (32, 65), got (32, 64)")
    refused(lambda: ck.save_params(path, config, {"params": params}), "missing", "unexpected")
    refused(lambda: ck.save_params(path, config, params, "int8"), "int8")  # type: ignore[arg-type]
    refused(lambda: ck.save_params(tmp_path / "no" / "w", config, params), "existing directory")
    params["mask_decoder"]["iou_token"][0, 0] = 1e6
    refused(lambda: ck.save_params(path, config, params, "float16"), "mask_decoder/iou_token", "float16")
    del params["mask_decoder"]["iou_token"]
    refused(lambda: ck.export_state_dict(params), "1 missing (mask_decoder/iou_token)")
    assert not path.exists()


def own_file(path: Path, tiny, **metadata: str) -> Path:
    config, params = tiny
    values = {"format": "sam_flax", "version": "1", "config": json.dumps(config.to_dict())} | metadata
    path.write_bytes(to_safetensors(ck._flatten(params), values))
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
def test_own_files_with_other_configurations(tiny, tmp_path, changes, part):
    text = json.dumps(tiny[0].to_dict() | changes)
    path = own_file(tmp_path / "w.safetensors", tiny, config=text)
    refused(lambda: ck.load_params(path), str(path), part)


def test_own_files_with_other_metadata(golden, tiny, tmp_path):
    path = tmp_path / "w.safetensors"
    for text in ("", "{", "[]", "[" * 100_000, "{}", '{"depth": 1}'):
        refused(lambda text=text: ck.load_params(own_file(path, tiny, config=text)), str(path), "configuration")
    refused(lambda: ck.load_params(own_file(path, tiny, version="2")), "version '2'")
    path.write_bytes(to_safetensors(golden, {"format": "pt"}))
    refused(lambda: ck.load_params(path), "load_sam")
    refused(lambda: ck.load_params(TINY_PTH), "load_sam")


def test_load_sam(tiny, tmp_path):
    jax = pytest.importorskip("jax")
    sam, params = ck.load_sam(TINY_PTH, decoder_num_heads=4)
    assert sam.config == TINY
    ck.save_params(tmp_path / "own", *tiny)
    own, same = ck.load_sam(str(tmp_path / "own"))
    assert own.config == TINY
    assert jax.tree.all(jax.tree.map(lambda a, b: isinstance(a, jax.Array) and bool((a == b).all()), params, same))
    refused(lambda: ck.load_sam(tmp_path / "own", decoder_num_heads=8), "decoder_num_heads=4, not 8")


def test_missing_packaged_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(ck, "MINI_WEIGHTS", tmp_path / "mini.safetensors")
    refused(lambda: ck.load_sam("mini"), "reinstall", error=FileNotFoundError)


# ---------------------------------------------------------------------------------------------------- fuzzing

EXECUTION = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "pickle.find_class",
    "exec",
    "compile",
}
watching: list[str] | None = None


def watch(event: str, _args) -> None:
    if watching is not None and event in EXECUTION:
        watching.append(event)


sys.addaudithook(watch)  # a hook stays for the life of the process; `watching` switches it


def survives(path: Path, read) -> None:
    """`read` either works or raises a plain ValueError, and nothing runs."""
    global watching
    watching = []
    try:
        read(path)
    except ValueError as error:
        assert type(error) is ValueError and str(path) in str(error)
        assert "\n" not in str(error)
    finally:
        seen, watching = watching, None
    assert not seen


flips = st.lists(st.tuples(st.integers(0, 1 << 24), st.integers(1, 255)), min_size=1, max_size=4)
quick = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def damage(content: bytes, changes, keep: float) -> bytes:
    damaged = bytearray(content)
    for position, mask in changes:
        damaged[position % len(damaged)] ^= mask
    return bytes(damaged[: int(len(damaged) * keep)])


def convert_file(path: Path) -> None:
    ck.convert(ck.read_state_dict(path), decoder_num_heads=4, source=f"Checkpoint {path}")


@pytest.fixture(scope="module")
def small_pth(tmp_path_factory) -> bytes:
    path = write_pth(tmp_path_factory.mktemp("fuzz") / "w.pth", {"a": W.reshape(3, 4), "b": W[:5]}, "model")
    return path.read_bytes()


@quick
@given(changes=flips, keep=st.sampled_from([1.0, 1.0, 0.999, 0.7, 0.01]))
def test_fuzz_archive(small_pth, tmp_path, changes, keep):
    """A small archive, where flips reach the zip directory, the pickle and the data alike."""
    path = tmp_path / "w.pth"
    path.write_bytes(damage(small_pth, changes, keep))
    survives(path, ck.read_state_dict)


@quick
@given(changes=flips, keep=st.sampled_from([1.0, 1.0, 0.9]))
def test_fuzz_pickle(tmp_path, changes, keep):
    """The golden pickle under a valid checksum, so that every flip reaches the interpreter."""
    with zipfile.ZipFile(TINY_PTH) as source:
        records = {name: source.read(name) for name in source.namelist()}
    name = next(n for n in records if n.endswith("data.pkl"))
    records[name] = damage(records[name], changes, keep)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for key, raw in records.items():
            target.writestr(key, raw)
    path = tmp_path / "w.pth"
    path.write_bytes(buffer.getvalue())
    survives(path, convert_file)


@quick
@given(st.binary(max_size=60))
def test_fuzz_random_pickles(tmp_path, pickled):
    survives(write_zip(tmp_path / "w.pth", b"\x80\x02" + pickled, {"0": W.tobytes()}), ck.read_state_dict)


@quick
@given(changes=flips, keep=st.sampled_from([1.0, 0.5]))
def test_fuzz_golden_file(tmp_path, changes, keep):
    path = tmp_path / "w.pth"
    path.write_bytes(damage(TINY_PTH.read_bytes(), changes, keep))
    survives(path, convert_file)


@pytest.fixture(scope="module")
def own_content(golden, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "w.safetensors"
    ck.save_params(path, *ck.convert(golden, decoder_num_heads=4), "float16")
    return path.read_bytes()


@quick
@given(changes=flips, keep=st.sampled_from([1.0, 1.0, 0.5]), header_only=st.booleans())
def test_fuzz_own_file(own_content, tmp_path, changes, keep, header_only):
    path = tmp_path / "w.safetensors"
    if header_only:
        size = 8 + struct.unpack("<Q", own_content[:8])[0]
        changes = [(position % size, mask) for position, mask in changes]
    path.write_bytes(damage(own_content, changes, keep))
    survives(path, ck.load_params)
