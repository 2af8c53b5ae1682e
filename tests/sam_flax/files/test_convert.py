"""State dicts <-> our tree: names and layouts both ways, and every state dict that does not fit one sentence."""

import re

import numpy as np
import pytest

from sam_flax.config import SamConfig
from sam_flax.files.convert import convert, export_state_dict
from sam_flax.files.parameters import HF_POSITIONS
from sam_flax.files.tensor_files import read_state_dict

W = np.arange(12, dtype=np.float32)


# ------------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "sam.", "module.sam_model."])
def test_round_trip_is_exact(tiny_state, prefix, tiny_config):
    config, params = convert({prefix + k: v for k, v in tiny_state.items()}, decoder_num_heads=4)
    assert config == tiny_config
    exported = export_state_dict(params)
    assert exported.keys() == tiny_state.keys()
    for name, value in tiny_state.items():
        assert exported[name].dtype == np.float32 and exported[name].flags.c_contiguous
        np.testing.assert_array_equal(exported[name], value)


def test_layouts(tiny_state, tiny_tree):
    params = tiny_tree[1]
    encoder, decoder = params["image_encoder"], params["mask_decoder"]
    np.testing.assert_array_equal(
        encoder["patch_embed"]["proj"]["kernel"][3, 5, 1, 7],
        tiny_state["image_encoder.patch_embed.proj.weight"][7, 1, 3, 5],
    )
    np.testing.assert_array_equal(
        encoder["blocks_2"]["attn"]["qkv"]["kernel"], tiny_state["image_encoder.blocks.2.attn.qkv.weight"].T
    )
    np.testing.assert_array_equal(
        decoder["output_upscaling"]["conv1"]["kernel"][0, 1, 5, 3],
        tiny_state["mask_decoder.output_upscaling.0.weight"][5, 3, 0, 1],
    )
    np.testing.assert_array_equal(
        params["prompt_encoder"]["point_embeddings"][2], tiny_state["prompt_encoder.point_embeddings.2.weight"][0]
    )


def test_result_does_not_alias_its_source(tiny_state):
    source = {name: value.copy() for name, value in tiny_state.items()}
    _, params = convert(source, decoder_num_heads=4)
    params["image_encoder"]["pos_embed"][:] = 7
    export_state_dict(params)["image_encoder.pos_embed"][:] = 8
    np.testing.assert_array_equal(source["image_encoder.pos_embed"], tiny_state["image_encoder.pos_embed"])
    assert (params["image_encoder"]["pos_embed"] == 7).all()


def test_tree_is_the_modules_tree(tiny_tree):
    jax = pytest.importorskip("jax")
    from sam_flax.sam import Sam

    config, params = tiny_tree
    expected = jax.eval_shape(Sam(config).init_params, jax.random.key(0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)


def test_pixel_statistics_go_into_the_configuration(tiny_state):
    extra = {
        "pixel_mean": np.array([[[1.5]], [[2.5]], [[123.675]]], np.float32),
        "pixel_std": np.array([1, 2, 3], np.float32),
    }
    config, _ = convert(tiny_state | extra, decoder_num_heads=4)
    assert config.pixel_mean == (1.5, 2.5, 123.675) and config.pixel_std == (1, 2, 3)


# ----------------------------------------------------------------------------------------- Hugging Face's names


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
def test_hugging_face_names(tiny_state, tied, tiny_config):
    state = {to_hugging_face(k): v for k, v in tiny_state.items()}
    prompt, image = HF_POSITIONS
    state[image] = state[prompt]
    if tied == "shared_image_embedding":
        del state[prompt]
    elif tied == "prompt_encoder":
        del state[image]
    config, params = convert(state, decoder_num_heads=4)
    assert config == tiny_config
    exported = export_state_dict(params)
    assert exported.keys() == tiny_state.keys()
    for name, value in tiny_state.items():
        np.testing.assert_array_equal(exported[name], value)


def test_hugging_face_tied_values_must_agree(tiny_state, refused):
    state = {to_hugging_face(k): v for k, v in tiny_state.items()}
    state[HF_POSITIONS[1]] = state[HF_POSITIONS[0]] + 1
    refused(lambda: convert(state), *HF_POSITIONS)


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
        config, params = convert(read_state_dict(tmp_path / name), decoder_num_heads=4)
        assert config == expected
        ours = export_state_dict(params)
        for meta, value in ours.items():
            np.testing.assert_array_equal(value, model.state_dict()[to_hugging_face(meta)].numpy())


# -------------------------------------------------------------------------------- state dicts that do not fit


def test_missing_and_unexpected_names_are_listed_both_ways(tiny_state, refused):
    state = {k: v for k, v in tiny_state.items() if "blocks.1.mlp" not in k and "no_mask" not in k}
    state |= {f"mask_decoder.hf_mlp.{i}.weight": W for i in range(10)}
    message = refused(
        lambda: convert(state, source="Checkpoint x.pth"),
        "Checkpoint x.pth",
        "5 missing",
        "image_encoder.blocks.1.mlp.lin1.weight",
        "prompt_encoder.no_mask_embed.weight",
        "10 unexpected",
        "and 2 more",
    )
    assert message.count("hf_mlp") == 8


def test_absurd_index_is_one_unexpected_name(tiny_state, refused):
    state = tiny_state | {"image_encoder.blocks.999999999999.norm1.weight": W}
    refused(lambda: convert(state), "1 unexpected", "14 missing (image_encoder.blocks.4.")


def test_not_a_sam(tiny_state, refused):
    refused(lambda: convert({"conv1.weight": W, "fc.bias": W}), "is not a SAM", "conv1.weight")
    refused(lambda: convert({}), "is not a SAM")
    refused(lambda: convert({"image_encoder.x\n\x1b[31m": W}), "unexpected")
    prefixed = {"module." + k: v for k, v in tiny_state.items()}
    name = "prompt_encoder.no_mask_embed.weight"
    refused(lambda: convert(prefixed | {name: tiny_state[name]}), name, "twice", "'module.'")


@pytest.mark.filterwarnings("ignore:State dict does not say how many heads")
def test_wrong_shapes_are_named(tiny_state, refused):
    name = "mask_decoder.transformer.layers.1.mlp.lin2.weight"
    refused(lambda: convert(tiny_state | {name: tiny_state[name].T}), name, "(32, 64)", "(64, 32)")
    refused(lambda: convert(tiny_state | {name: W}), name, "(12,)")
    refused(lambda: convert(tiny_state | {name: np.zeros((0, 64), np.float32)}), name, "(0, 64)")
    name = "image_encoder.blocks.2.attn.rel_pos_h"
    refused(lambda: convert(tiny_state | {name: np.zeros((9, 16), np.float32)}), "[5, 9, 15]", "8x8")
    name = "image_encoder.blocks.0.attn.rel_pos_h"
    refused(lambda: convert(tiny_state | {name: np.zeros((5, 17), np.float32)}), "17", "64")
    for heads in (5, 0, -4):
        refused(lambda heads=heads: convert(tiny_state, decoder_num_heads=heads), "decoder_num_heads")
    refused(lambda: convert(tiny_state | {"pixel_mean": W}), "pixel_mean")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_not_finite_are_named(tiny_state, bad, refused):
    name = "mask_decoder.iou_token.weight"
    value = tiny_state[name].astype(np.float64)
    value[0, 3] = bad
    refused(lambda: convert(tiny_state | {name: value}, decoder_num_heads=4), name)
    refused(lambda: convert(tiny_state | {name: value.astype(complex)}, decoder_num_heads=4), name, "complex")
