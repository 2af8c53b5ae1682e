"""The model against the official functions' stored outputs, and against itself by other routes."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_flax import MINI_SCENES as MINI
from sam_flax import VIT_B, VIT_H, VIT_L, Sam, SamConfig, SamModel, load_sam
from sam_flax.encoders import vit as encoder_module
from sam_flax.encoders.vit import (
    Attention,
    PatchEmbed,
    attention,
    make_block,
    relative_scores,
    split_heads,
    window_unpartition,
)
from sam_flax.layers import Conv, PatchConv, Site, UpConv, project
from sam_flax.sam import apply_embed, apply_stage, encoder_stages
from sam_flax.segmenter import random_like

CASES = ("box1", "box3", "points", "points_pad", "mask", "box1_points", "box1_mask")


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


def assert_close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Equality up to `tolerance` times the largest value, and never more than 1e-4."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    largest = np.abs(want).max(initial=0)
    np.testing.assert_allclose(got, want, rtol=0, atol=min(tolerance * largest, 1e-4))


def prompts_of(io: dict[str, np.ndarray], case: str) -> dict[str, Any]:
    """The prompts of a stored case as keyword arguments of `encode_prompts` and `decode`."""
    kwargs: dict[str, Any] = {}
    if f"{case}_in_point_coords" in io:
        kwargs["points"] = (io[f"{case}_in_point_coords"], io[f"{case}_in_point_labels"])
    if f"{case}_in_boxes" in io:
        kwargs["boxes"] = io[f"{case}_in_boxes"]
    if f"{case}_in_masks" in io:
        kwargs["masks"] = channels_last(io[f"{case}_in_masks"])
    return jax.tree.map(jnp.asarray, kwargs)


@pytest.fixture(scope="module")
def tiny(sam_tiny) -> SamModel:
    config, params = sam_tiny
    return SamModel(Sam(config), params)


@pytest.fixture(scope="module")
def embedding(sam_tiny_io) -> jax.Array:
    """The official embedding of the first image, channels last."""
    return jnp.asarray(channels_last(sam_tiny_io["image_embedding"][:1]))


# ------------------------------------------------------------------------- against the official functions


def test_golden_configuration(sam_tiny, tiny_config):
    assert sam_tiny[0] == tiny_config


def test_golden_pth_holds_the_same_model(sam_tiny, data_dir):
    sam, params = load_sam(data_dir / "sam_tiny_s0.pth", decoder_num_heads=4)
    assert sam.config == sam_tiny[0]
    jax.tree.map(np.testing.assert_array_equal, {**params}, sam_tiny[1])


@pytest.mark.parametrize(("precision", "wanted"), [("float32", "HIGHEST"), ("tensorfloat32", "HIGH"), ("bfloat16", "")])
def test_products_ask_for_their_precision(tiny, precision, wanted):
    """What a device does with it is the device's; CPUs compute all of them in float32."""
    key, module = encoder_stages(tiny.config)[1]
    x = jnp.zeros((1, tiny.config.grid, tiny.config.grid, tiny.config.embed_dim))
    text = apply_stage.lower(module, tiny.params["image_encoder"][key], x, precision).as_text()
    products = re.findall(r"stablehlo\.dot_general.*", text)
    assert len(products) >= 6
    asked = f"precision = [{wanted}, {wanted}]" if wanted else "precision = [DEFAULT, DEFAULT]"
    assert all(asked in product for product in products), products


def test_golden_encoder_stages_in_two_compilations(tiny, sam_tiny_io):
    stage: Any = apply_stage
    stage.clear_cache()
    encoder = tiny.params["image_encoder"]
    images = jnp.asarray(channels_last(sam_tiny_io["image"]))
    x = apply_embed(PatchEmbed(16, 64), {k: encoder[k] for k in ("patch_embed", "pos_embed")}, images)
    assert_close(x[:1], sam_tiny_io["patch_embed_plus_pos_img0"])
    for i, (key, module) in enumerate(encoder_stages(tiny.config)):
        x = apply_stage(module, encoder[key], x, tiny.precision)
        if key != "neck":
            assert_close(x[:1], sam_tiny_io[f"block{i}_out_img0"])
    assert_close(x, channels_last(sam_tiny_io["image_embedding"]))
    assert_close(x, tiny.encode_image(images), 0)
    # Other parameters in the same compilations.
    other = SamModel(Sam(tiny.config), jax.tree.map(lambda a: a + np.float32(0.1), tiny.params))
    assert np.abs(other.encode_image(images) - x).max() > 1e-2
    assert stage._cache_size() == 3  # windowed blocks, global blocks, the neck
    assert len({make_block(VIT_H, i) for i in range(VIT_H.depth)}) == 2


def test_golden_dense_positions(tiny, sam_tiny_io):
    pe = tiny.sam.apply({"params": tiny.params}, method=lambda m: m.prompt_encoder.get_dense_pe())
    assert_close(pe, channels_last(sam_tiny_io["dense_pe"]))


@pytest.fixture(scope="module")
def decode_masks(tiny, embedding):
    """(sparse, dense) -> multi-mask and single-mask outputs on the official embedding."""

    @jax.jit
    def run(sparse: jax.Array, dense: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        variables = {"params": tiny.params}
        return [
            tiny.sam.apply(variables, embedding, sparse, dense, multimask_output=multi, method="decode_masks")
            for multi in (True, False)
        ]

    return run


@pytest.fixture(scope="module")
def encoded_prompts(tiny, sam_tiny_io):
    """Stored case -> sparse and dense embeddings."""
    encode = jax.jit(lambda prompts: tiny.sam.apply({"params": tiny.params}, **prompts, method="encode_prompts"))
    return functools.cache(lambda case: encode(prompts_of(sam_tiny_io, case)))


@pytest.mark.parametrize("case", CASES)
def test_golden_prompts(sam_tiny_io, encoded_prompts, case):
    sparse, dense = encoded_prompts(case)
    assert_close(sparse, sam_tiny_io[f"{case}_sparse"])
    assert_close(dense, channels_last(sam_tiny_io[f"{case}_dense"]))


# Each shape of prompt is a compilation.
DECODED = ("box3", "points_pad", "mask", "box1_points")


@pytest.mark.parametrize(
    "case", [case if case in DECODED else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_golden_masks(sam_tiny_io, encoded_prompts, decode_masks, case):
    io = sam_tiny_io
    multi, single = decode_masks(*encoded_prompts(case))
    for name, (low_res, iou) in (("multi", multi), ("single", single)):
        assert_close(low_res, io[f"{case}_{name}_low_res_masks"])
        assert_close(iou, io[f"{case}_{name}_iou"])


# -------------------------------------------------------------------------------- against other routes


@pytest.fixture(scope="module")
def two_prompts() -> tuple[Any, ...]:
    """Two prompts of points (one of them padding), box and mask each, positional for `decode`."""
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.uniform(0, 128, (2, 2, 2)), axis=1).reshape(2, 4)
    points = rng.uniform(0, 128, (2, 3, 2)), np.array([[1, 0, 1], [1, -1, 0]], np.int32)
    masks = rng.normal(0, 5, (2, 32, 32, 1))
    return jax.tree.map(
        lambda a: jnp.asarray(a, jnp.int32 if a.dtype == np.int32 else jnp.float32),
        (
            points,
            boxes,
            masks,
        ),
    )


def test_batch_of_prompts_equals_one_at_a_time(tiny, sam_tiny_io, embedding, two_prompts):
    both = jnp.asarray(channels_last(sam_tiny_io["image_embedding"]))
    for embeddings in (embedding, both):  # one image for both prompts, an image for each
        together = tiny.decode(embeddings, *two_prompts)
        assert [a.shape for a in together] == [(2, 3, 32, 32), (2, 3)]
        for i in range(2):
            prompts = jax.tree.map(lambda a, i=i: a[i : i + 1], two_prompts)
            alone = tiny.decode(embeddings[i : i + 1] if len(embeddings) > 1 else embeddings, *prompts)
            for got, want in zip(alone, together, strict=True):
                assert_close(got, want[i : i + 1])


def test_whole_graph_in_chunks_equals_stages(monkeypatch, tiny, sam_tiny_io, two_prompts):
    """`Sam.apply`, with attention forced into chunks, and `SamModel`, which attends directly here."""
    images = jnp.asarray(channels_last(sam_tiny_io["image"]))
    want = tiny.decode(tiny.encode_image(images), *two_prompts)
    monkeypatch.setattr(encoder_module, "_attention_bytes", lambda: (1, 1))
    monkeypatch.setattr(encoder_module, "QUERY_CHUNK", 16)
    got = jax.jit(tiny.sam.apply)({"params": tiny.params}, images, *two_prompts)
    assert [a.shape for a in got] == [(2, 3, 32, 32), (2, 3)]
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


def test_padding_point_changes_the_tokens_but_its_place_does_not_matter(tiny):
    def sparse(coords):
        points = (jnp.asarray(coords, jnp.float32)[None], jnp.asarray([[1, -1]]))
        return tiny.sam.apply({"params": tiny.params}, points, method="encode_prompts")[0]

    assert_close(sparse([[10, 20], [0, 0]]), sparse([[10, 20], [77, 3]]), 0)


# ----------------------------------------------------------------------------------------- attention, windows


def attention_operands(groups: int, h: int, w: int, d: int = 8) -> Any:
    rng = np.random.default_rng(3)
    n = h * w
    shapes = [(groups, n, d)] * 3 + [(groups, n, h), (groups, n, w)]
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


def halve(p: jax.Array) -> jax.Array:
    """Stands in for a quantizer that training differentiates."""
    return p + jax.lax.stop_gradient(jnp.round(p * 64) / 64 - p)


def test_probabilities_that_no_one_touches_are_divided_after_the_values():
    operands = attention_operands(4, 8, 8)
    assert_close(attention(*operands, lambda p: p), attention(*operands, lambda p: p + 0))


ONE_MAP = 64 * 64 * 4  # bytes of one head's map on 8x8 tokens


@pytest.mark.parametrize(
    ("part", "chunk", "largest"),
    [
        (1, 16, ONE_MAP),
        (1, 12, ONE_MAP),  # which does not divide the 64 queries: they stay whole
        (1, 12, ONE_MAP - 1),  # where the map may not: five chunks and a rest of four queries
        (1, 63, 1),
        (ONE_MAP, 16, ONE_MAP),  # head by head
        (3 * ONE_MAP, 16, ONE_MAP),  # 3 do not divide the 4 heads: two at a time
    ],
)
@pytest.mark.parametrize("site", [halve, lambda p: p])
def test_attention_in_parts_equals_direct(monkeypatch, part, chunk, largest, site):
    operands = attention_operands(4, 8, 8)

    def values_and_gradients() -> Any:
        def loss(*operands: Any) -> tuple[jax.Array, jax.Array]:
            q, k, v, bias_h, bias_w = operands
            out = attention(q, k, v, bias_h, bias_w, site)
            return jnp.sum(out**2), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=range(5), has_aux=True))(*operands)
        return out, gradients

    direct, direct_gradients = values_and_gradients()
    monkeypatch.setattr(encoder_module, "_attention_bytes", lambda: (1, part))
    monkeypatch.setattr(encoder_module, "QUERY_CHUNK", chunk)
    monkeypatch.setattr(encoder_module, "MAX_ATTENTION_BYTES", largest)
    out, gradients = values_and_gradients()
    assert_close(out, direct)
    for got, want in zip(gradients, direct_gradients, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("side", [64, 65, 67])
def test_large_maps_are_never_held_whole(side):
    """Images of 1024, 1040 and 1072 pixels: 65*65 and 67*67 queries fall into no whole chunks."""
    shapes = [(2, side**2, 64)] * 3 + [(2, side**2, side)] * 2
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(lambda *args: attention(*args, halve)).lower(*operands).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < side**4 * 4 / 2


@pytest.mark.parametrize(("inside", "outside"), [(6, 9), (9, 6)])
def test_projection_and_its_gradient_equal_the_plain_product(inside, outside):
    rng = np.random.default_rng(0)
    x, kernel, cotangent = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in [(2, 3, inside), (inside, outside), (2, 3, outside)]
    )
    out, pull_back = jax.vjp(project, x, kernel)
    want, pull_back_want = jax.vjp(jnp.matmul, x, kernel)
    assert_close(out, want, 0)
    for got, gradient in zip(pull_back(cotangent), pull_back_want(cotangent), strict=True):
        assert_close(got, gradient)


def random_params(module: nn.Module, *args: Any) -> Any:
    """Parameters without the compilations of real initialisers."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    return jax.tree.map(lambda a: rng.normal(0, 0.5, a.shape).astype(np.float32), shapes)


def test_attention_equals_the_formula_in_float64():
    side, heads, dim = 4, 2, 8
    module = Attention(dim, heads, size=side)
    x = np.random.default_rng(0).normal(size=(1, side, side, dim)).astype(np.float32)
    params = random_params(module, x)
    p = jax.tree.map(lambda a: a.astype(np.float64), params)
    n = side * side
    qkv = x.reshape(n, dim).astype(np.float64) @ p["qkv"]["kernel"] + p["qkv"]["bias"]
    q, k, v = np.moveaxis(qkv.reshape(n, 3, heads, dim // heads), 1, 0)
    out = np.zeros((n, heads, dim // heads))
    for head in range(heads):
        for i in range(n):
            scores = np.empty(n)
            for j in range(n):
                vertical = p["rel_pos_h"][i // side - j // side + side - 1]
                horizontal = p["rel_pos_w"][i % side - j % side + side - 1]
                scores[j] = q[i, head] @ (k[j, head] / np.sqrt(dim // heads) + vertical + horizontal)
            e = np.exp(scores - scores.max())
            out[i, head] = (e / e.sum()) @ v[:, head]
    want = out.reshape(n, dim) @ p["proj"]["kernel"] + p["proj"]["bias"]
    got = jax.jit(module.apply)({"params": params}, x)[0]
    assert_close(got, want.reshape(side, side, dim))
    with pytest.raises(ValueError, match="7 relative positions is for a grid 4 tokens wide, not 3"):
        jax.eval_shape(module.apply, {"params": params}, x[:, :3])


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_relative_positions_are_query_minus_key(n):
    rng = np.random.default_rng(n)
    q, table = rng.integers(-9, 9, (2, 3, n, 5)), rng.integers(-9, 9, (2 * n - 1, 5))
    got = relative_scores(jnp.asarray(q, jnp.float32), jnp.asarray(table, jnp.float32))
    for i, j in np.ndindex(n, n):
        np.testing.assert_array_equal(got[:, :, i, j], q[:, :, i] @ table[i - j + n - 1])


@pytest.mark.parametrize(("h", "w", "window"), [(8, 8, 3), (64, 64, 14), (5, 7, 4), (6, 6, 3), (2, 2, 5)])
def test_windows(h, w, window):
    heads, d = 2, 3
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, h, w, 3 * heads * d)).astype(np.float32)
    bias = rng.normal(size=3 * heads * d).astype(np.float32)
    got = np.asarray(jax.jit(split_heads, static_argnums=(2, 3))(x, bias, (window, window), heads))
    rows, cols = -(-h // window), -(-w // window)
    assert got.shape == (3, 2 * rows * cols * heads, window * window, d)
    padded = np.zeros((2, rows * window, cols * window, 3 * heads * d), np.float32)
    padded[:, :h, :w] = x
    windows = []
    for b in range(2):
        for i in range(rows):
            for j in range(cols):
                windows.append(padded[b, i * window : (i + 1) * window, j * window : (j + 1) * window])
    for index, part in enumerate(windows):
        for which in range(3):
            for head in range(heads):
                first = (which * heads + head) * d
                want = (part + bias)[..., first : first + d].reshape(-1, d)
                np.testing.assert_array_equal(got[which, index * heads + head], want)
    windows = np.array(windows)
    back = jax.jit(window_unpartition, static_argnums=1)(windows, (h, w))
    np.testing.assert_array_equal(back, x)


# ------------------------------------------------------------------------------------------------- layers


def convolve(x: np.ndarray, kernel: np.ndarray, stride: int, padding: str) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(
        jnp.asarray(x), jnp.asarray(kernel), strides, padding, dimension_numbers=numbers
    )


@pytest.mark.parametrize("size", [1, 3, 5])
def test_convolution_equals_lax(size):
    x = np.random.default_rng(0).normal(size=(2, 6, 9, 4)).astype(np.float32)
    module = Conv(4, 5, size)
    params = random_params(module, x)
    assert_close(jax.jit(module.apply)({"params": params}, x), convolve(x, params["kernel"], 1, "SAME"))


def test_patch_convolution_equals_lax():
    x = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
    module = PatchConv(3, 5, 4)
    params = random_params(module, x)
    want = convolve(x, params["kernel"], 4, "VALID") + params["bias"]
    assert_close(jax.jit(module.apply)({"params": params}, x), want)


def test_transposed_convolution_places_each_tap():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    module = UpConv(5, 6)
    params = random_params(module, x)
    out = np.asarray(jax.jit(module.apply)({"params": params}, x))
    assert out.shape == (2, 6, 8, 6)
    for a in range(2):
        for b in range(2):
            assert_close(out[:, a::2, b::2], x @ params["kernel"][a, b] + params["bias"])


# --------------------------------------------------------------------------------------- parameters and sites


def shapes_of(tree: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(k.key for k in path): (a.shape, a.dtype) for path, a in leaves}


def whole_graph_arguments(config: SamConfig) -> tuple[Any, ...]:
    points = (jnp.zeros((1, 1, 2)), jnp.ones((1, 1), jnp.int32))
    images = jnp.zeros((1, config.img_size, config.img_size, 3))
    masks = jnp.zeros((1, config.mask_size, config.mask_size, 1))
    return images, points, jnp.zeros((1, 4)), masks


def test_init_params_equal_flax_init_in_shape(sam_tiny):
    config, loaded = sam_tiny
    sam = Sam(config)
    want = jax.eval_shape(sam.init, jax.random.key(0), *whole_graph_arguments(config))["params"]
    got = jax.eval_shape(sam.init_params, jax.random.key(0))
    assert shapes_of(got) == shapes_of(want) == shapes_of(loaded)


def test_init_values(sam_tiny):
    block = sam_tiny[1]["image_encoder"]["blocks_0"]  # the whole model would take many compilations
    first, again, other = (random_like(block, jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernel, width = first["mlp"]["lin1"]["kernel"], 64
    assert not np.array_equal(kernel, other["mlp"]["lin1"]["kernel"])
    assert not np.array_equal(kernel[:, :width], first["attn"]["proj"]["kernel"])
    assert float(kernel.std()) == pytest.approx((2 / (5 * width)) ** 0.5, rel=0.05)  # Glorot
    assert (first["norm1"]["scale"] == 1).all() and (first["mlp"]["lin1"]["bias"] == 0).all()
    assert (first["attn"]["rel_pos_h"] == 0).all()


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (VIT_B, 93_735_472),
        pytest.param(VIT_L, 312_342_832, marks=pytest.mark.slow),
        pytest.param(VIT_H, 641_090_608, marks=pytest.mark.slow),
    ],
)
def test_published_parameter_counts(config, count):
    shapes = jax.eval_shape(Sam(config).init, jax.random.key(0), *whole_graph_arguments(config))["params"]
    # PyTorch counts the Fourier matrix among the buffers.
    matrix = shapes["prompt_encoder"]["pe_layer"]["positional_encoding_gaussian_matrix"]
    assert sum(a.size for a in jax.tree.leaves(shapes)) - matrix.size == count


def expected_sites(config: SamConfig) -> set[str]:
    paths: set[str] = set()
    for i in range(config.depth):
        block = f"image_encoder/blocks_{i}"
        paths |= {f"{block}/attn/{s}" for s in ("qkv/input", "q", "k", "v", "operands", "softmax")}
        paths |= {f"{block}/{s}/input" for s in ("attn/proj", "mlp/lin1", "mlp/lin2")}
    paths |= {f"image_encoder/neck/{s}/input" for s in ("conv1", "conv2")}
    decoder = "mask_decoder/transformer"
    attentions = [f"{decoder}/final_attn_token_to_image"]
    for i in range(config.decoder_depth):
        layer = f"{decoder}/layers_{i}"
        names = ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
        attentions += [f"{layer}/{name}" for name in names]
        paths |= {f"{layer}/mlp/{s}/input" for s in ("lin1", "lin2")}
    for path in attentions:
        paths |= {f"{path}/{s}_proj/input" for s in ("q", "k", "v", "out")}
        paths |= {f"{path}/{s}" for s in ("q", "k", "v", "operands", "softmax")}
    heads = [f"output_hypernetworks_mlps_{i}" for i in range(config.num_multimask_outputs + 1)]
    paths |= {f"mask_decoder/{head}/layers_{j}/input" for head in heads for j in range(3)}
    depth = config.iou_head_depth
    return paths | {f"mask_decoder/iou_prediction_head/layers_{j}/input" for j in range(depth)}


def record_sites(run) -> list[str]:
    """Paths of the sites that `run()` calls, in order."""
    paths: list[str] = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, Site):
            paths.append("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        run()
    return paths


def test_every_site_is_reached_once_under_its_path(tiny):
    args = whole_graph_arguments(tiny.config)
    reached = record_sites(lambda: jax.eval_shape(tiny.sam.apply, {"params": tiny.params}, *args))
    assert len(reached) == len(set(reached))
    assert set(reached) == expected_sites(tiny.config)


def test_stages_have_the_sites_of_the_whole_graph(tiny):
    tokens = jnp.zeros((1, tiny.config.grid, tiny.config.grid, tiny.config.embed_dim))
    paths: set[str] = set()
    for key, module in encoder_stages(tiny.config):
        params = tiny.params["image_encoder"][key]
        reached = record_sites(lambda m=module, p=params: jax.eval_shape(m.apply, {"params": p}, tokens))
        paths |= {f"image_encoder/{key}/{path}" for path in reached}
    assert paths == {p for p in expected_sites(tiny.config) if p.startswith("image_encoder/")}


def test_a_site_can_be_changed_from_outside(tiny, sam_tiny_io):
    params = tiny.params["image_encoder"]["blocks_0"]

    def silence(call, args, kwargs, context):
        path = context.module.path
        return args[0] * 0 if path[-2:] == ("lin2", "input") else call(*args, **kwargs)

    @jax.jit
    def run(x: jax.Array) -> tuple[Any, Any]:
        block = make_block(tiny.config, 0)
        with nn.intercept_methods(silence):
            changed = block.apply({"params": params}, x)
        attended = block.apply({"params": params}, x, method="attention_part")
        return changed, attended + params["mlp"]["lin2"]["bias"]

    assert_close(*run(sam_tiny_io["patch_embed_plus_pos_img0"]))


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"img_size": 100}, "img_size=100 is not a multiple of patch_size=16; change one of them"),
        ({"num_heads": 7}, "embed_dim=768 is not a multiple of num_heads=7; change one of them"),
        ({"out_chans": 100}, "out_chans=100 must be a multiple of 8"),
        ({"decoder_num_heads": 24}, r"out_chans=256 must be .* 2\*decoder_num_heads=48"),
        ({"global_attn_indexes": (2, 12)}, r"global_attn_indexes=\(2, 12\) must lie in 0..depth-1=11"),
        ({"global_attn_indexes": (-1,)}, r"global_attn_indexes=\(-1,\) must lie in"),
    ],
)
def test_config_errors(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(VIT_B, **changes)


def test_config_dict_errors():
    values = MINI.to_dict()
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\]"):
        SamConfig.from_dict(values | {"colour": 1})
    del values["depth"]
    with pytest.raises(ValueError, match="incomplete or mistyped.*depth"):
        SamConfig.from_dict(values)


@pytest.mark.parametrize("config", [MINI, VIT_B, VIT_L, VIT_H])
def test_config_survives_its_dict_and_hashes(config):
    again = SamConfig.from_dict(config.to_dict() | {"pixel_mean": list(config.pixel_mean)})
    assert again == config and hash(again) == hash(config)


def entry_points(model: SamModel) -> Iterator[Any]:
    yield model.encode_image
    yield lambda images: model.sam.apply({"params": model.params}, images, method="encode_image")


@pytest.mark.parametrize("shape", [(128, 128, 3), (1, 128, 128), (1, 64, 128, 3), (1, 3, 128, 128)])
def test_wrong_canvas(tiny, shape):
    for encode in entry_points(tiny):
        with pytest.raises(ValueError, match=r"needs images of shape \(batch, 128, 128, 3\) but got"):
            encode(jnp.zeros(shape))


def test_wrong_prompts(tiny, embedding):
    with pytest.raises(ValueError, match="at least one must be given"):
        tiny.decode(embedding)
    with pytest.raises(ValueError, match=r"have sizes \[1, 2\]; give points, boxes and masks of the same"):
        tiny.decode(embedding, boxes=jnp.zeros((2, 4)), masks=jnp.zeros((1, 32, 32, 1)))
    with pytest.raises(ValueError, match="3 image embeddings for 2 prompts"):
        tiny.decode(jnp.tile(embedding, (3, 1, 1, 1)), boxes=jnp.zeros((2, 4)))
