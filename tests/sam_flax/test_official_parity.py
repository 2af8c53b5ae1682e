"""The official PyTorch models, randomly initialised and saved, against ours loaded from their files.

Needs the `parity` extra: torch with segment-anything-py, and transformers for its own port.
"""

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco

from sam_flax import Sam, SamAutomaticMaskGenerator, SamConfig, SamModel, SamPredictor, load_sam
from sam_flax.files.convert import export_state_dict

torch = pytest.importorskip("torch", reason="PyTorch is not installed; it comes with the extra [parity]")

TOLERANCE = 1e-4  # of the largest value; 1e-3 is promised, float32 leaves 1e-6 to 1e-5


def relative_error(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy()


def randomize(model: Any, seed: int) -> Any:
    """Seeded weights with which every part of the graph matters, relative positions above all."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: Any, std: float, mean: float = 0.0) -> Any:
        return mean + std * torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or (p.ndim == 1 and name.split(".")[-2].isdigit() and "weight" in name):
                p.copy_(normal(p.shape, 0.2, mean=float(name.endswith("weight"))))
            elif "rel_pos" in name:
                p.copy_(normal(p.shape, 0.2))
            elif p.ndim == 1:
                p.copy_(normal(p.shape, 0.1))
            elif "embed" in name or "token" in name.split(".")[-2]:
                p.copy_(normal(p.shape, 0.5))
            else:
                # Fan-in of a linear or convolution; a transposed one has (in, out, 2, 2) and no overlap.
                fan_in = p.shape[0] if "upscal" in name or "upscale" in name else p[0].numel()
                p.copy_(normal(p.shape, 1.2 / fan_in**0.5))
    return model.eval()


# --------------------------------------------------------------------------------------- segment_anything


def box_area(boxes: Any) -> Any:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def batched_nms(boxes: Any, scores: Any, _: Any, iou_threshold: float) -> Any:
    """torchvision's suppression, by definition, where all boxes are of one category."""
    area, kept = box_area(boxes), []
    for i in torch.sort(scores, stable=True, descending=True)[1].tolist():
        shared = torch.clamp(
            torch.minimum(boxes[i, 2:], boxes[kept, 2:]) - torch.maximum(boxes[i, :2], boxes[kept, :2]), 0
        )
        shared = shared.prod(1)
        if not (shared / (area[i] + area[kept] - shared) > iou_threshold).any():
            kept.append(i)
    return torch.tensor(kept, dtype=torch.int64)


@pytest.fixture(scope="module")
def segment_anything() -> Iterator[Any]:
    """The official package; torchvision, of which it uses one function on pictures, may be absent."""
    if importlib.util.find_spec("segment_anything") is None:
        pytest.skip("segment_anything is not installed; it comes with the extra [parity]")
    stubs: dict[str, types.ModuleType] = {}
    if importlib.util.find_spec("torchvision") is None:
        names = ("", ".transforms", ".transforms.functional", ".ops", ".ops.boxes")
        stubs = {f"torchvision{name}": types.ModuleType(f"torchvision{name}") for name in names}
        functional: Any = stubs["torchvision.transforms.functional"]
        functional.to_pil_image = Image.fromarray
        functional.resize = lambda image, size: image.resize(size[::-1], Image.Resampling.BILINEAR)
        boxes: Any = stubs["torchvision.ops.boxes"]
        boxes.batched_nms, boxes.box_area = batched_nms, box_area
    sys.modules.update(stubs)
    try:
        import segment_anything
    finally:
        for name in stubs:  # others ask whether torchvision exists
            del sys.modules[name]
    yield segment_anything


def official_sam(package: Any, img_size: int, depth: int, global_blocks: tuple[int, ...]) -> Any:
    """SAM-B (build_sam.py) but for its depth and canvas."""
    from functools import partial

    modeling, grid = package.modeling, img_size // 16
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    encoder = modeling.ImageEncoderViT(
        img_size=img_size,
        depth=depth,
        embed_dim=768,
        num_heads=12,
        mlp_ratio=4,
        norm_layer=norm,
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=global_blocks,
        window_size=14,
        out_chans=256,
        patch_size=16,
    )
    prompts = modeling.PromptEncoder(256, (grid, grid), (img_size, img_size), mask_in_chans=16)
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    decoder = modeling.MaskDecoder(
        transformer_dim=256,
        transformer=transformer,
        num_multimask_outputs=3,
        iou_head_depth=3,
        iou_head_hidden_dim=256,
    )
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    return randomize(modeling.Sam(encoder, prompts, decoder, mean, std), seed=img_size)


def save_and_load(model: Any, path: Path) -> tuple[Sam, Any]:
    torch.save(model.state_dict(), path)
    return load_sam(path)


def check_embedding(official: Any, sam: Sam, params: Any) -> tuple[float, Any]:
    """Relative error of the embedding of a random canvas, and that embedding, official layout."""
    size = sam.config.img_size
    images = np.random.default_rng(0).normal(size=(1, 3, size, size)).astype(np.float32)
    with torch.no_grad():
        want = official.image_encoder(torch.from_numpy(images))
    assert want.std(dim=(2, 3)).min() > 1e-3  # no flat channel, which would hide errors
    got = SamModel(sam, params).encode_image(jnp.asarray(images.transpose(0, 2, 3, 1)))
    return relative_error(got, numpy(want).transpose(0, 2, 3, 1)), want


PROMPTS: dict[str, dict[str, Any]] = {
    "box": {"boxes": [[20, 30, 150, 200], [100, 5, 250, 90]]},
    "points": {"points": ([[[40, 60], [100.5, 20]], [[200, 9], [3, 250]]], [[1, 0], [1, -1]])},
    "mask": {"masks": 2},
    "box_points_mask": {"boxes": [[20, 30, 150, 200]], "points": ([[[40, 60]]], [[1]]), "masks": 1},
}


def prompts_for(case: str, mask_size: int) -> dict[str, Any]:
    """boxes (N, 4), points ((N, P, 2), (N, P)) and masks (N, 1, 4g, 4g) as NumPy."""
    prompts: dict[str, Any] = {}
    for name, value in PROMPTS[case].items():
        if name == "points":
            prompts[name] = (np.array(value[0], np.float32), np.array(value[1], np.int32))
        elif name == "boxes":
            prompts[name] = np.array(value, np.float32)
        else:
            shape = (value, 1, mask_size, mask_size)
            prompts[name] = np.random.default_rng(1).normal(0, 5, shape).astype(np.float32)
    return prompts


def decode_ours(sam: Sam, params: Any, embedding: Any, prompts: dict[str, Any], multimask: bool) -> Any:
    ours = jax.tree.map(jnp.asarray, prompts)
    if "masks" in ours:
        ours["masks"] = ours["masks"].transpose(0, 2, 3, 1)
    features = jnp.asarray(numpy(embedding).transpose(0, 2, 3, 1))
    return SamModel(sam, params).decode(features, **ours, multimask_output=multimask)


@pytest.fixture(scope="module")
def vit_b(segment_anything, tmp_path_factory) -> tuple[Any, Sam, Any]:
    """20x20 tokens: windows of 14 are padded to 28, and two blocks are windowed, one global."""
    official = official_sam(segment_anything, img_size=320, depth=3, global_blocks=(1,))
    sam, params = save_and_load(official, tmp_path_factory.mktemp("sam") / "sam_b.pth")
    assert (sam.config.window_size, sam.config.global_attn_indexes) == (14, (1,))
    return official, sam, params


@pytest.fixture(scope="module")
def vit_b_embedding(vit_b) -> tuple[float, Any]:
    return check_embedding(*vit_b)


def test_embedding(vit_b_embedding, record_property):
    error, _ = vit_b_embedding
    record_property("relative_error", error)
    assert error <= TOLERANCE


@pytest.mark.parametrize("case", PROMPTS)
def test_masks(vit_b, vit_b_embedding, record_property, case):
    official, sam, params = vit_b
    _, embedding = vit_b_embedding
    prompts = prompts_for(case, sam.config.mask_size)
    tensors = {k: tuple(map(torch.from_numpy, v)) if k == "points" else torch.from_numpy(v) for k, v in prompts.items()}
    for multimask in (True, False):
        with torch.no_grad():
            sparse, dense = official.prompt_encoder(tensors.get("points"), tensors.get("boxes"), tensors.get("masks"))
            pe = official.prompt_encoder.get_dense_pe()
            want, want_iou = official.mask_decoder(embedding, pe, sparse, dense, multimask_output=multimask)
        assert (want > 0).any() and (want < 0).any() and want.std(dim=(2, 3)).min() > 0.02 * want.abs().max()
        got, iou = decode_ours(sam, params, embedding, prompts, multimask)
        errors = relative_error(got, numpy(want)), relative_error(iou, numpy(want_iou))
        record_property(f"relative_error_{multimask}", max(errors))
        assert max(errors) <= TOLERANCE


@pytest.mark.parametrize(("height", "width"), [(123, 187), (400, 300)])
def test_predictor(segment_anything, vit_b, record_property, height, width):
    """From picture to masks, resizing included."""
    official, sam, params = vit_b
    image = np.random.default_rng(2).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    theirs, ours = segment_anything.SamPredictor(official), SamPredictor(sam, params)
    theirs.set_image(image)
    ours.set_image(image)
    embedding_error = relative_error(ours.get_image_embedding(), numpy(theirs.get_image_embedding()))
    prompts: dict[str, Any] = {
        "point_coords": np.array([[50, 60], [20.5, 100]]),
        "point_labels": np.array([1, 0]),
        "box": np.array([10, 20, 110, 111]),
    }
    want = theirs.predict(**prompts, return_logits=True)
    got = ours.predict(**prompts, return_logits=True)
    errors = [embedding_error, *(relative_error(a, b) for a, b in zip(got, want, strict=True))]
    record_property("relative_error", max(errors))
    assert max(errors) <= TOLERANCE
    masks, _, low_res = ours.predict(**prompts)
    their_masks, _, _ = theirs.predict(**prompts)
    assert masks.dtype == their_masks.dtype and masks.shape == their_masks.shape
    assert (masks == their_masks).mean() > 0.9999
    best = low_res[:1]
    again = ours.predict(**prompts, mask_input=best, multimask_output=False, return_logits=True)
    their_again = theirs.predict(**prompts, mask_input=best, multimask_output=False, return_logits=True)
    assert max(relative_error(a, b) for a, b in zip(again, their_again, strict=True)) <= TOLERANCE


def official_of(package: Any, config: SamConfig, params: Any) -> Any:
    """The official model of a configuration, with our parameters."""
    from functools import partial

    c, modeling = config, package.modeling
    encoder = modeling.ImageEncoderViT(
        img_size=c.img_size,
        patch_size=c.patch_size,
        embed_dim=c.embed_dim,
        depth=c.depth,
        num_heads=c.num_heads,
        mlp_ratio=c.mlp_ratio,
        out_chans=c.out_chans,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=c.window_size,
        global_attn_indexes=c.global_attn_indexes,
    )
    prompts = modeling.PromptEncoder(c.out_chans, (c.grid, c.grid), (c.img_size, c.img_size), c.mask_in_chans)
    transformer = modeling.TwoWayTransformer(c.decoder_depth, c.out_chans, c.decoder_num_heads, c.decoder_mlp_dim)
    decoder = modeling.MaskDecoder(
        transformer_dim=c.out_chans,
        transformer=transformer,
        iou_head_depth=c.iou_head_depth,
        iou_head_hidden_dim=c.iou_head_hidden_dim,
    )
    model = modeling.Sam(encoder, prompts, decoder, list(c.pixel_mean), list(c.pixel_std))
    state = {name: torch.from_numpy(value) for name, value in export_state_dict(params).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"pixel_mean", "pixel_std"} and not unexpected
    return model.eval()


def shapes_on_a_plane() -> np.ndarray:
    """Five discs and a bar, 150x200 pixels."""
    picture = Image.new("RGB", (200, 150), (90, 120, 150))
    draw = ImageDraw.Draw(picture)
    for i, (x, y, r) in enumerate([(40, 40, 25), (120, 50, 30), (170, 110, 20), (60, 110, 28), (110, 115, 12)]):
        draw.ellipse([x - r, y - r, x + r, y + r], fill=(i * 70 % 255, (i * 120 + 60) % 255, (200 - i * 30) % 255))
    draw.rectangle([5, 80, 25, 140], fill=(240, 230, 40))
    return np.asarray(picture)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"points_per_side": 8, "pred_iou_thresh": 0.7, "stability_score_thresh": 0.8},
        {
            "points_per_side": 6,
            "points_per_batch": 10,
            "pred_iou_thresh": 0.6,
            "stability_score_thresh": 0.5,
            "crop_n_layers": 1,
            "crop_n_points_downscale_factor": 2,
            "min_mask_region_area": 30,
        },
        {"points_per_side": 4, "pred_iou_thresh": 0.5, "stability_score_thresh": 0.0, "crop_n_layers": 2},
    ],
)
def test_automatic_masks(segment_anything, record_property, arguments):
    sam, params = load_sam("mini-scenes")
    official = official_of(segment_anything, sam.config, params)
    arguments = arguments | {"output_mode": "coco_rle"}
    want = segment_anything.SamAutomaticMaskGenerator(official, **arguments).generate(shapes_on_a_plane())
    got = SamAutomaticMaskGenerator(SamModel(sam, params), **arguments).generate(shapes_on_a_plane())
    record_property("records", len(want))
    assert len(got) == len(want) > 2
    for ours, theirs in zip(got, want, strict=True):
        assert ours["bbox"] == theirs["bbox"] and ours["crop_box"] == theirs["crop_box"]
        assert ours["point_coords"] == theirs["point_coords"] and abs(ours["area"] - theirs["area"]) <= 2
        if theirs["area"]:  # with no threshold on the stability, a mask may be empty and its stability NaN
            assert coco.iou([ours["segmentation"]], [theirs["segmentation"]], [0])[0, 0] > 0.995
        assert abs(ours["predicted_iou"] - theirs["predicted_iou"]) < 1e-4
        np.testing.assert_allclose(ours["stability_score"], theirs["stability_score"], atol=1e-2)


def test_prompts_on_the_canvas(segment_anything, sam_tiny):
    """`predict_torch` with the coordinates of `transform`, and an image that is resized already."""
    config, params = sam_tiny
    theirs, ours = (
        segment_anything.SamPredictor(official_of(segment_anything, config, params)),
        SamPredictor(SamModel(Sam(config), params)),
    )
    image = shapes_on_a_plane()
    resized = theirs.transform.apply_image(image)
    np.testing.assert_array_equal(ours.transform.apply_image(image), resized)
    chw = np.ascontiguousarray(resized.transpose(2, 0, 1))[None]
    theirs.set_torch_image(torch.from_numpy(chw), image.shape[:2])
    ours.set_torch_image(torch.from_numpy(chw), image.shape[:2])
    coords, labels = np.array([[[40.0, 40], [60, 60]], [[120, 50], [9, 9]]]), np.array([[1, 0], [1, 1]])
    boxes = np.array([[10.0, 20, 70, 80], [90, 20, 150, 80]])
    moved = theirs.transform.apply_coords(coords, image.shape[:2]), theirs.transform.apply_boxes(boxes, image.shape[:2])
    np.testing.assert_allclose(ours.transform.apply_coords(coords, image.shape[:2]), moved[0], rtol=1e-6)
    np.testing.assert_allclose(ours.transform.apply_boxes(boxes, image.shape[:2]), moved[1], rtol=1e-6)
    points = torch.from_numpy(moved[0].astype(np.float32)), torch.from_numpy(labels)
    prompts = {"boxes": torch.from_numpy(moved[1].astype(np.float32)), "return_logits": True}
    want, got = theirs.predict_torch(*points, **prompts), ours.predict_torch(*points, **prompts)
    assert max(relative_error(a, numpy(b)) for a, b in zip(got, want, strict=True)) <= TOLERANCE


@pytest.mark.slow
def test_full_canvas(segment_anything, tmp_path, record_property):
    """1024 pixels: 64x64 tokens padded to 70 for the windows; global attention goes in chunks."""
    official = official_sam(segment_anything, img_size=1024, depth=2, global_blocks=(1,))
    sam, params = save_and_load(official, tmp_path / "sam_b.pth")
    error, embedding = check_embedding(official, sam, params)
    record_property("relative_error", error)
    assert error <= TOLERANCE
    prompts = prompts_for("box_points_mask", sam.config.mask_size)
    with torch.no_grad():
        points = tuple(map(torch.from_numpy, prompts["points"]))
        boxes, masks = (torch.from_numpy(prompts[k]) for k in ("boxes", "masks"))
        sparse, dense = official.prompt_encoder(points, boxes, masks)
        pe = official.prompt_encoder.get_dense_pe()
        want, _ = official.mask_decoder(embedding, pe, sparse, dense, multimask_output=True)
    got, _ = decode_ours(sam, params, embedding, prompts, True)
    assert relative_error(got, numpy(want)) <= TOLERANCE


def lengthen_tables(official: Any, length: int) -> Any:
    """The model with relative positions of `length` in its global blocks, which it interpolates when it runs."""
    generator = torch.Generator().manual_seed(length)
    for block in official.image_encoder.blocks:
        if block.window_size == 0:
            for name in ("rel_pos_h", "rel_pos_w"):
                table = 0.2 * torch.randn((length, 64), generator=generator)
                setattr(block.attn, name, torch.nn.Parameter(table))
    return official


@pytest.mark.parametrize("size", [224, 256, 512])
def test_fine_tuned_at_another_size(segment_anything, tmp_path, record_property, size):
    """Global blocks keep the 127 positions of 1024 pixels; at 224, windows have as many tokens as the grid."""
    official = lengthen_tables(official_sam(segment_anything, img_size=size, depth=3, global_blocks=(2,)), 127)
    sam, params = save_and_load(official, tmp_path / "tuned.pth")
    assert (sam.config.img_size, sam.config.window_size, sam.config.global_attn_indexes) == (size, 14, (2,))
    error, _ = check_embedding(official, sam, params)
    record_property("relative_error", error)
    assert error <= TOLERANCE
    image = np.random.default_rng(2).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    theirs, ours = segment_anything.SamPredictor(official), SamPredictor(sam, params)
    theirs.set_image(image)
    ours.set_image(image)
    box = np.array([10, 20, 70, 80])
    want, got = theirs.predict(box=box, return_logits=True), ours.predict(box=box, return_logits=True)
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) <= TOLERANCE
    pixels = [(want[0] > 0).sum((1, 2)), (got[0] > 0).sum((1, 2))]
    record_property("mask_pixels", str(pixels))
    assert np.abs(pixels[0] - pixels[1]).max() <= 3


def test_positions_stored_for_other_tests(segment_anything, golden):
    """tests/data/sam_tiny_positions_s0.npz is what the official encoder answers."""
    from functools import partial

    stored, state = golden("sam_tiny_positions_s0"), golden("sam_tiny_weights_s0")
    images = np.random.default_rng(0).normal(size=(1, 128, 128, 3)).astype(np.float32)
    for window, table in ((3, 31), (8, 31), (3, 11), (3, 20)):
        encoder = segment_anything.modeling.ImageEncoderViT(
            img_size=128,
            embed_dim=64,
            depth=4,
            num_heads=4,
            out_chans=32,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=window,
            global_attn_indexes=(1, 3),
        )
        rng = np.random.default_rng(table + window)
        weights = {k.removeprefix("image_encoder."): v for k, v in state.items() if k.startswith("image_encoder.")}
        for i, block in enumerate(encoder.blocks):
            for name in ("rel_pos_h", "rel_pos_w"):
                length = table if block.window_size == 0 else 2 * window - 1
                value = rng.normal(0, 0.3, (length, 16)).astype(np.float16).astype(np.float32)
                setattr(block.attn, name, torch.nn.Parameter(torch.from_numpy(value)))
                weights[f"blocks.{i}.attn.{name}"] = value
        encoder.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
        with torch.no_grad():
            want = numpy(encoder(torch.from_numpy(images.transpose(0, 3, 1, 2)))).transpose(0, 2, 3, 1)
        np.testing.assert_allclose(stored[f"window{window}_table{table}"], want, atol=1e-5)


# -------------------------------------------------------------------------------------------- transformers


def test_hugging_face(tmp_path, record_property):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed; it comes with the extra [parity]"
    )
    size, chans = 128, 32
    config = transformers.SamConfig(
        vision_config=transformers.SamVisionConfig(
            hidden_size=64,
            output_channels=chans,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=size,
            patch_size=16,
            window_size=3,
            global_attn_indexes=[1],
            num_pos_feats=chans // 2,
            mlp_dim=256,
        ),
        prompt_encoder_config=transformers.SamPromptEncoderConfig(
            hidden_size=chans, image_size=size, patch_size=16, mask_input_channels=8
        ),
        mask_decoder_config=transformers.SamMaskDecoderConfig(
            hidden_size=chans, mlp_dim=64, num_attention_heads=4, iou_head_hidden_dim=32
        ),
    )
    official = randomize(transformers.SamModel(config), seed=0)
    official.save_pretrained(tmp_path)
    sam, params = load_sam(tmp_path / "model.safetensors", decoder_num_heads=4)
    model = SamModel(sam, params)

    rng = np.random.default_rng(0)
    images = rng.normal(size=(1, size, size, 3)).astype(np.float32)
    boxes = np.array([[10, 20, 90, 100], [30, 5, 60, 120]], np.float32)
    coords = rng.uniform(0, size, (2, 3, 2)).astype(np.float32)
    labels = np.array([[1, 0, 1], [0, 1, 1]], np.int32)
    embedding = model.encode_image(jnp.asarray(images))
    errors = []
    for with_boxes, with_points, multimask in ((True, True, True), (False, True, False)):
        theirs: dict[str, Any] = {}
        if with_boxes:
            theirs["input_boxes"] = torch.from_numpy(boxes)[None]
        if with_points:
            theirs["input_points"] = torch.from_numpy(coords)[None]
            theirs["input_labels"] = torch.from_numpy(labels)[None]
        with torch.no_grad():
            pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
            output = official(pixel_values=pixels, multimask_output=multimask, **theirs)
            features = official.get_image_embeddings(pixels)
        points = (jnp.asarray(coords), jnp.asarray(labels)) if with_points else None
        low_res, iou = model.decode(
            embedding, points, jnp.asarray(boxes) if with_boxes else None, multimask_output=multimask
        )
        errors += [
            relative_error(np.moveaxis(np.asarray(embedding), -1, 1), numpy(features)),
            relative_error(low_res, numpy(output.pred_masks[0])),
            relative_error(iou, numpy(output.iou_scores[0])),
        ]
    record_property("relative_error", max(errors))
    assert max(errors) <= TOLERANCE
