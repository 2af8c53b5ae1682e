"""Resizing, padding, coordinates and mask upscaling, against PyTorch's numbers and the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sam_flax import MINI_SCENES as MINI
from sam_flax import VIT_B
from sam_flax.preprocessing import (
    apply_boxes,
    apply_coords,
    check_image,
    interpolation_matrix,
    normalize_and_pad,
    postprocess_masks,
    prepare_image,
    preprocess_shape,
    resize_image,
)

sides = st.integers(1, 3000)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "want"),
    [
        (480, 640, (768, 1024)),
        (1365, 2048, (683, 1024)),  # 682.5 goes up, where Python's round goes to 682
        (640, 427, (1024, 683)),
        (1024, 1024, (1024, 1024)),
        (1, 1, (1024, 1024)),
        (3, 1000, (3, 1024)),
        (1, 5000, (1, 1024)),  # 0.2 of a pixel: one is kept
        (5000, 1, (1024, 1)),
    ],
)
def test_preprocess_shape(height, width, want):
    assert preprocess_shape(height, width, 1024) == want


@given(sides, sides, st.sampled_from([160, 1024]))
def test_longest_side_and_aspect(height, width, long_side):
    new = preprocess_shape(height, width, long_side)
    assert max(new) == long_side and min(new) >= 1
    scale = long_side / max(height, width)
    for old_side, new_side in zip((height, width), new, strict=True):
        assert abs(new_side - old_side * scale) <= 0.5 or new_side == 1


@pytest.mark.parametrize(("height", "width"), [(37, 83), (83, 37), (333, 217), (1, 700), (700, 1), (1, 1), (160, 160)])
def test_resize(height, width):
    image = picture(height, width)
    resized = resize_image(image, 160)
    assert resized.dtype == np.uint8
    assert resized.shape == (*preprocess_shape(height, width, 160), 3)
    want = Image.fromarray(image).resize(resized.shape[1::-1], Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resized, np.asarray(want))


def test_resize_is_antialiased():
    stripes = np.zeros((320, 320, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize_image(stripes, 160)[:, 2:-2].astype(int) - 127).max() <= 1


def test_resize_takes_views():
    image = picture(40, 60)
    np.testing.assert_array_equal(
        resize_image(image[::-1, ::-1, ::-1], 160), resize_image(image[::-1, ::-1, ::-1].copy(), 160)
    )


def test_normalize_and_pad():
    image = picture(5, MINI.img_size)
    canvas = normalize_and_pad(image, MINI)
    assert canvas.shape == (160, 160, 3) and canvas.dtype == np.float32
    assert (canvas[5:] == 0).all()
    want = (image.astype(np.float64) - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    np.testing.assert_allclose(canvas[:5], want, atol=1e-6)


def test_prepare_image_fills_the_corner():
    canvas, size = prepare_image(picture(50, 100), MINI)
    assert size == (80, 160)
    assert (canvas[80:] == 0).all() and (canvas[:80] != 0).any(axis=(0, 1)).all()


# (new, old) -> rows of torch.nn.functional.interpolate(eye, mode="bilinear", align_corners=False), torch 2.13.
TORCH_ROWS = {
    (6, 3): [
        [1.0, 0.0, 0.0],
        [0.75, 0.25, 0.0],
        [0.25, 0.75, 0.0],
        [0.0, 0.75, 0.25],
        [0.0, 0.25, 0.75],
        [0.0, 0.0, 1.0],
    ],
    (2, 5): [[0.25, 0.75, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.75, 0.25]],
    (5, 3): [
        [1.0, 0.0, 0.0],
        [0.6, 0.4, 0.0],
        [0.0, 1.0, 0.0],
        [0.0, 0.4, 0.6],
        [0.0, 0.0, 1.0],
    ],
    (4, 1): [[1.0]] * 4,
    (1, 4): [[0.0, 0.5, 0.5, 0.0]],
}


@pytest.mark.parametrize(("new", "old"), TORCH_ROWS)
def test_interpolation_matrix_equals_torch(new, old):
    matrix = interpolation_matrix(new, old)
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(matrix, TORCH_ROWS[new, old], atol=1e-6)


@pytest.mark.parametrize(("new", "old"), [(160, 20), (83, 160), (7, 31), (31, 7), (9, 9)])
def test_interpolation_matrix_equals_jax(new, old):
    want = jax.image.resize(jnp.eye(old), (new, old), "bilinear", antialias=False)
    np.testing.assert_allclose(interpolation_matrix(new, old), want, rtol=0, atol=2e-5)


@given(st.integers(1, 400), st.integers(1, 400))
@settings(max_examples=50)
def test_interpolation_rows_are_averages(new, old):
    matrix = interpolation_matrix(new, old)
    assert matrix.shape == (new, old) and (matrix >= 0).all()
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    assert ((matrix > 0).sum(axis=1) <= 2).all()


def test_golden_postprocess(sam_tiny_io):
    io = sam_tiny_io
    (in_h, in_w), (h, w) = (map(int, io[f"postproc_{n}_size"]) for n in ("input", "original"))
    got = postprocess_masks(io["box1_single_low_res_masks"], (in_h, in_w), (h, w), 128)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, io["postproc_box1_single"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("original", [(37, 83), (301, 200), (1, 700), (700, 1), (1, 1)])
def test_postprocess_equals_two_resizes(original):
    low = np.random.default_rng(1).normal(size=(2, 3, 80, 80)).astype(np.float32)
    inside = preprocess_shape(original[0], original[1], MINI.img_size)
    canvas = interpolation_matrix(160, 80) @ low @ interpolation_matrix(160, 80).T
    cut = canvas[..., : inside[0], : inside[1]]
    want = interpolation_matrix(original[0], inside[0]) @ cut @ interpolation_matrix(original[1], inside[1]).T
    got = postprocess_masks(low, inside, original, 160)
    assert got.shape == (2, 3, *original)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_postprocess_does_not_see_the_padding():
    low = np.zeros((1, 80, 80), np.float32)
    low[:, 42:] = 1e6  # a landscape image of half height ends at row 40
    assert np.abs(postprocess_masks(low, (80, 160), (50, 100), 160)).max() == 0


def test_apply_coords_scales_each_axis_by_the_rounded_size():
    # 427x640 becomes 683x1024: the vertical scale is 683/427, not 1.6.
    got = apply_coords(np.array([[640, 427], [0, 0], [1, 1]]), (427, 640), 1024)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.array([[1024, 683], [0, 0], [1.6, 683 / 427]]), rtol=1e-6)


def test_apply_boxes_moves_both_corners_and_keeps_the_input():
    boxes = np.array([[10, 20, 30, 40], [0, 0, 640, 427]])
    before = boxes.copy()
    got = apply_boxes(boxes, (427, 640), VIT_B.img_size)
    np.testing.assert_array_equal(boxes, before)
    assert got.shape == (2, 4)
    np.testing.assert_allclose(got[:, :2], apply_coords(boxes[:, :2], (427, 640), 1024))
    np.testing.assert_allclose(got[:, 2:], apply_coords(boxes[:, 2:], (427, 640), 1024))


@given(sides, sides)
def test_corners_of_the_image_are_corners_of_its_part_of_the_canvas(height, width):
    moved = apply_coords(np.array([width, height]), (height, width), 160)
    np.testing.assert_allclose(moved, preprocess_shape(height, width, 160)[::-1], rtol=1e-6)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (np.zeros((4, 4, 3), np.float32), r"uint8 array of shape \(height, width, 3\) but is float32"),
        (np.zeros((4, 4), np.uint8), r"is uint8 of shape \(4, 4\); convert it to 8-bit RGB"),
        (np.zeros((4, 4, 4), np.uint8), r"is uint8 of shape \(4, 4, 4\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"is uint8 of shape \(1, 4, 4, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), r"has shape \(0, 4, 3\) and no pixels"),
        (np.zeros((4, 4, 3), np.uint16), "but is uint16"),
        (None, "but is object"),
    ],
)
def test_check_image(image, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_image(image)
