"""`SamPredictor`: segment_anything's interface, and a sentence for every wrong input."""

import inspect
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from sam_flax import Sam, SamModel, SamPredictor
from sam_flax.preprocessing import apply_boxes, apply_coords, postprocess_masks, prepare_image

HEIGHT, WIDTH = 60, 83
BOX = np.array([10, 12, 50, 45])
COORDS = np.array([[20, 30], [60.5, 10]])
LABELS = np.array([1, 0])


def picture(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(sam_tiny) -> SamModel:
    config, params = sam_tiny
    return SamModel(Sam(config), params)


@pytest.fixture
def predictor(model) -> SamPredictor:
    predictor = SamPredictor(model)
    predictor.set_image(picture())
    return predictor


# ------------------------------------------------------------------------------------------- the interface


def test_signatures_are_those_of_segment_anything():
    predict = inspect.signature(SamPredictor.predict).parameters
    defaults = {name: p.default for name, p in predict.items() if name != "self"}
    assert defaults == {
        "point_coords": None,
        "point_labels": None,
        "box": None,
        "mask_input": None,
        "multimask_output": True,
        "return_logits": False,
    }
    names = ["point_coords", "point_labels", "box", "mask_input", "multimask_output", "return_logits"]
    assert list(defaults) == names, "in this order"
    batch = inspect.signature(SamPredictor.predict_batch).parameters
    assert batch["multimask_output"].default is batch["return_logits"].default is False
    set_image = inspect.signature(SamPredictor.set_image).parameters
    assert list(set_image)[1:] == ["image", "image_format"]
    assert set_image["image_format"].default == "RGB"
    for name in ("reset_image", "get_image_embedding"):
        assert callable(getattr(SamPredictor, name))


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("logits", [True, False])
def test_shapes_and_types(predictor, multimask, logits):
    masks, iou, low_res = predictor.predict(box=BOX, multimask_output=multimask, return_logits=logits)
    count = 3 if multimask else 1
    assert masks.shape == (count, HEIGHT, WIDTH) and masks.dtype == (np.float32 if logits else np.bool_)
    assert iou.shape == (count,) and iou.dtype == np.float32
    assert low_res.shape == (count, 32, 32) and low_res.dtype == np.float32
    for array in (masks, iou, low_res, predictor.get_image_embedding()):
        assert type(array) is np.ndarray and array.flags.writeable


BATCH = {
    "boxes": np.array([BOX, BOX + 7]),
    "point_coords": np.array([COORDS, COORDS + 3]),
    "point_labels": np.array([LABELS, 1 - LABELS]),
    "mask_input": np.random.default_rng(0).normal(0, 4, (2, 1, 32, 32)).astype(np.float32),
    "multimask_output": True,
}


def test_batch_shapes(predictor):
    masks, iou, low_res = predictor.predict_batch(**BATCH)
    assert (masks.shape, iou.shape, low_res.shape) == ((2, 3, HEIGHT, WIDTH), (2, 3), (2, 3, 32, 32))
    assert masks.dtype == np.bool_


def test_masks_are_the_models_at_the_original_size(predictor, model):
    """Everything between picture and mask by hand."""
    canvas, inside = prepare_image(picture(), model.config)
    features = model.encode_image(jnp.asarray(canvas[None]))
    boxes = jnp.asarray(apply_boxes(BOX[None], (HEIGHT, WIDTH), 128))
    points = (jnp.asarray(apply_coords(COORDS[None], (HEIGHT, WIDTH), 128)), jnp.asarray(LABELS[None]))
    low, iou = model.decode(features, points, boxes)
    logits = postprocess_masks(np.asarray(low[0]), inside, (HEIGHT, WIDTH), 128)

    prompts: dict[str, Any] = {"point_coords": COORDS, "point_labels": LABELS, "box": BOX}
    got, got_iou, got_low = predictor.predict(**prompts, return_logits=True)
    np.testing.assert_array_equal(got_low, low[0])
    np.testing.assert_array_equal(got_iou, iou[0])
    np.testing.assert_allclose(got, logits, rtol=0, atol=1e-5)
    masks, _, _ = predictor.predict(**prompts)
    np.testing.assert_array_equal(masks, got > 0)
    assert 0 < masks.mean() < 1
    assert np.asarray(predictor.get_image_embedding()).shape == (1, 32, 8, 8)
    np.testing.assert_array_equal(predictor.get_image_embedding(), np.moveaxis(features, -1, 1))


def test_prompts_on_the_canvas(predictor):
    """`predict_torch` and `transform` as code for segment_anything uses them."""
    size, transform = predictor.original_size, predictor.transform
    assert transform.target_length == 128
    moved = {
        "point_coords": transform.apply_coords(BATCH["point_coords"], size),
        "point_labels": BATCH["point_labels"],
        "boxes": transform.apply_boxes(BATCH["boxes"], size),
        "mask_input": BATCH["mask_input"],
    }
    want = predictor.predict_batch(**BATCH, return_logits=True)
    for given in (moved, {name: jnp.asarray(value) for name, value in moved.items()}):
        got = predictor.predict_torch(**given, return_logits=True)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
    single, _, _ = predictor.predict_torch(None, None, moved["boxes"], multimask_output=False)
    assert single.shape == (2, 1, HEIGHT, WIDTH) and single.dtype == np.bool_
    # Canvas pixels may lie outside of the image, and of the canvas: nothing tells which image they are of.
    predictor.predict_torch(np.array([[[200.0, 5.0]]]), np.array([[1]]))
    with pytest.raises(ValueError, match="No prompt"):
        predictor.predict_torch(None, None)
    with pytest.raises(ValueError, match="boxes has shape"):
        predictor.predict_torch(None, None, boxes=np.zeros(4))
    predictor.reset_image()
    assert not predictor.is_image_set
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict_torch(None, None, moved["boxes"])


def test_an_image_that_is_resized_already(predictor):
    embedding = predictor.get_image_embedding()
    resized = predictor.transform.apply_image(picture())
    assert resized.shape == (93, 128, 3)
    for dtype in (np.uint8, np.float32):
        predictor.reset_image()
        predictor.set_torch_image(resized.transpose(2, 0, 1)[None].astype(dtype), (HEIGHT, WIDTH))
        assert predictor.is_image_set and predictor.original_size == (HEIGHT, WIDTH)
        np.testing.assert_array_equal(predictor.get_image_embedding(), embedding)
    for image, size, part in (
        (resized[None], (HEIGHT, WIDTH), "shape"),
        (resized.transpose(2, 0, 1)[None], (HEIGHT, HEIGHT), "128x128"),
    ):
        with pytest.raises(ValueError, match=part):
            predictor.set_torch_image(image, size)
        assert not predictor.is_image_set


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, np.float64, np.int64, np.uint8, jnp.int4])
def test_numbers_of_every_type(predictor, dtype):
    """Values that each of them holds; JAX's small types are not NumPy's."""
    box = [0, 1, 7, 6]
    want = predictor.predict(box=np.array(box, np.float32), return_logits=True)
    for given in (jnp.asarray(box, dtype), np.asarray(jnp.asarray(box, dtype))):
        got = predictor.predict(box=given, return_logits=True)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


def test_predict_equals_predict_batch(predictor):
    together = predictor.predict_batch(**BATCH, return_logits=True)
    boxes, coords, labels, masks, _ = BATCH.values()
    for i in range(2):
        alone = predictor.predict(coords[i], labels[i], boxes[i], masks[i], return_logits=True)
        for got, want in zip(alone, together, strict=True):
            np.testing.assert_allclose(got, want[i], rtol=0, atol=2e-5)


def test_low_resolution_logits_can_be_fed_back(predictor):
    _, iou, low_res = predictor.predict(COORDS, LABELS, BOX)
    best = 100 * low_res[iou.argmax()][None]  # random weights give faint logits
    masks, _, again = predictor.predict(COORDS, LABELS, BOX, mask_input=best)
    assert masks.shape == (3, HEIGHT, WIDTH)
    other = predictor.predict(COORDS, LABELS, BOX, mask_input=-best)[2]
    assert np.abs(again - other).max() > 1e-3


@pytest.mark.parametrize("prompt", [{"mask_input": BATCH["mask_input"][0]}, {"box": BOX}, {"point_coords": COORDS}])
def test_one_kind_of_prompt_suffices(model, prompt):
    """The model gets that one on its canvas and no other; what it makes of it is tested with the model."""
    given = []

    class Recorder:
        config = model.config
        encode_image = staticmethod(model.encode_image)

        def decode(self, *arguments):
            given.append(arguments)
            return jnp.ones((1, 1, 32, 32)), jnp.ones((1, 1))

    predictor = SamPredictor(Recorder())
    predictor.set_image(picture())
    labels = {"point_labels": LABELS} if "point_coords" in prompt else {}
    masks, _, _ = predictor.predict(**prompt, **labels, multimask_output=False)
    assert masks.shape == (1, HEIGHT, WIDTH) and masks.all()
    ((_, points, boxes, mask, multimask),) = given
    assert multimask is False
    assert [points is None, boxes is None, mask is None].count(False) == 1
    if points is not None:
        np.testing.assert_allclose(points[0], apply_coords(COORDS[None], (HEIGHT, WIDTH), 128))
        np.testing.assert_array_equal(points[1], LABELS[None])
    if boxes is not None:
        np.testing.assert_allclose(boxes, apply_boxes(BOX[None], (HEIGHT, WIDTH), 128))
    if mask is not None:
        np.testing.assert_array_equal(mask[..., 0], prompt["mask_input"])


def test_three_ways_to_the_same_predictor(predictor, model):
    class Foreign:  # what a quantized model looks like
        config = model.config
        encode_image = staticmethod(model.encode_image)
        decode = staticmethod(model.decode)

    want = predictor.predict(box=BOX)
    for other in (SamPredictor(model.sam, model.params), SamPredictor(Foreign())):
        other.set_image(picture())
        for got, expected in zip(other.predict(box=BOX), want, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_bgr(predictor):
    want = predictor.predict(box=BOX)[2]
    predictor.set_image(picture()[..., ::-1], image_format="BGR")
    np.testing.assert_array_equal(predictor.predict(box=BOX)[2], want)
    predictor.set_image(picture()[..., ::-1])
    assert not np.array_equal(predictor.predict(box=BOX)[2], want)


@pytest.mark.parametrize(("height", "width"), [(1, 300), (300, 1), (128, 128), (257, 101), (1, 1)])
def test_any_size_of_image(predictor, height, width):
    predictor.set_image(picture(1, height, width))
    masks, _, _ = predictor.predict(box=np.array([0, 0, width, height]))
    assert masks.shape == (3, height, width)


def test_a_new_image_replaces_the_old(predictor):
    first = predictor.predict(box=BOX)[2]
    predictor.set_image(picture(1))
    assert not np.array_equal(predictor.predict(box=BOX)[2], first)
    predictor.set_image(picture())
    np.testing.assert_array_equal(predictor.predict(box=BOX)[2], first)


def test_padding_points(predictor):
    """Prompts with different numbers of points share a batch; a padding point may lie anywhere."""
    coords = np.array([[[20, 30], [-1, 999]], [[20, 30], [5, 5]]])
    _, _, low = predictor.predict_batch(point_coords=coords, point_labels=np.array([[1, -1], [1, -1]]))
    np.testing.assert_allclose(low[0], low[1], rtol=0, atol=1e-6)


def test_what_segment_anything_also_takes(predictor):
    want = predictor.predict(COORDS, LABELS, BOX)[2]
    lists = predictor.predict(COORDS.tolist(), LABELS.tolist(), BOX.tolist())[2]
    nested = predictor.predict(COORDS, LABELS.astype(np.float32), BOX[None])[2]
    np.testing.assert_array_equal(lists, want)
    np.testing.assert_array_equal(nested, want)


def test_boxes_may_reach_over_the_edge_and_points_may_touch_it(predictor, model):
    """The model sees such a box as it is, like segment_anything's."""
    box = np.array([-5, -5, WIDTH + 9, 40])
    low_res = predictor.predict(box=box)[2]
    wanted, _ = model.decode(predictor.features, None, jnp.asarray(apply_boxes(box[None], (HEIGHT, WIDTH), 128)))
    np.testing.assert_array_equal(low_res, wanted[0])
    corners = np.array([[0, 0], [WIDTH, HEIGHT]])
    assert predictor.predict(corners, np.array([1, 0]), BOX)[0].shape == (3, HEIGHT, WIDTH)


# ----------------------------------------------------------------------------------------------- wrong input


def test_no_image(model):
    predictor = SamPredictor(model)
    assert not predictor.is_image_set
    sentence = r"An image must be set with \.set_image\(\.\.\.\) before mask prediction"
    with pytest.raises(RuntimeError, match=sentence):
        predictor.predict(box=BOX)
    with pytest.raises(RuntimeError, match=sentence):
        predictor.predict_batch(boxes=BOX[None])
    with pytest.raises(RuntimeError, match=sentence):
        predictor.get_image_embedding()
    predictor.set_image(picture())
    assert predictor.is_image_set
    predictor.reset_image()
    with pytest.raises(RuntimeError, match=sentence):
        predictor.predict(box=BOX)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (picture() / 255.0, r"must be a uint8 array of shape \(height, width, 3\) but is float64"),
        (picture()[..., 0], r"is uint8 of shape \(60, 83\); convert it to 8-bit RGB"),
        (np.zeros((60, 83, 4), np.uint8), r"of shape \(60, 83, 4\); convert it"),
        (np.zeros((0, 83, 3), np.uint8), "has no pixels|and no pixels"),
        ("picture.jpg", "must be a uint8 array"),
    ],
)
def test_wrong_image_leaves_none(predictor, image, sentence):
    with pytest.raises(ValueError, match=sentence):
        predictor.set_image(image)
    assert not predictor.is_image_set


def test_wrong_image_format_leaves_none(predictor):
    with pytest.raises(ValueError, match="image_format must be 'RGB' or 'BGR' but is 'rgb'"):
        predictor.set_image(picture(), "rgb")
    assert not predictor.is_image_set


ONE = [
    ({}, "No prompt was given; give point_coords with point_labels, a box, or a mask_input"),
    ({"box": [10, np.nan, 50, 45]}, "box contains NaN or infinity; remove those prompts"),
    ({"box": [10, 12, np.inf, 45]}, "box contains NaN or infinity"),
    ({"box": [50, 12, 10, 45]}, r"box \[50, 12, 10, 45\] has x1 <= x0 or y1 <= y0; give corners as x0, y0"),
    ({"box": [10, 45, 50, 45]}, "has x1 <= x0 or y1 <= y0"),
    ({"box": [90, 5, 99, 9]}, r"box \[90, 5, 99, 9\] lies outside the image of 83x60 pixels; give x0, y0"),
    ({"box": [-9, -9, 0, -1]}, "lies outside the image of 83x60 pixels"),
    ({"box": [10, 60, 50, 70]}, "lies outside the image of 83x60 pixels"),
    ({"box": [10, 12, 50]}, r"box has shape \(3,\) but must be \(4,\)"),
    ({"box": [BOX, BOX]}, r"box has shape \(2, 4\) but must be \(4,\)"),
    ({"box": [0, 0, 1e300, 1e300]}, "box contains 1e.300, beyond 1e.06; give pixels of the original image"),
    ({"box": [0, 0, 1e30, 50]}, "box contains 1e.30"),
    ({"box": [-2e6, 0, 50, 50]}, "box contains 2e.06"),
    ({"box": [0, 0, 10**400, 50]}, "box is not an array of numbers"),
    ({"box": [0, 0, 1 << 62, 50]}, "box contains 4.61e.18"),
    ({"point_coords": [[1e300, 5]], "point_labels": [1]}, "point_coords contains 1e.300"),
    ({"point_coords": [[5, 5]], "point_labels": [1e300]}, "point_labels"),
    ({"box": "10,12,50,45"}, "box is not an array of numbers"),
    ({"box": [[10, 12], [50]]}, "box is not an array of numbers; give a NumPy array of int or float"),
    (
        {"point_coords": COORDS},
        "point_coords and point_labels must be given together; point_labels is missing",
    ),
    ({"point_labels": LABELS}, "must be given together; point_coords is missing"),
    ({"point_labels": LABELS, "box": BOX}, "must be given together; point_coords is missing"),
    ({"point_coords": [[84, 5]], "point_labels": [1]}, r"\[84, 5\] lies outside the image of 83x60 pixels"),
    ({"point_coords": [[5, -1]], "point_labels": [0]}, r"\[5, -1\] lies outside the image of 83x60 pixels"),
    ({"point_coords": [[5, np.nan]], "point_labels": [0]}, "point_coords contains NaN"),
    ({"point_coords": COORDS, "point_labels": [1]}, r"point_labels has shape \(1,\) but must be \(2,\)"),
    ({"point_coords": COORDS, "point_labels": [1, 2]}, r"1 \(object\), 0 \(background\) or -1 \(padding\)"),
    ({"point_coords": COORDS, "point_labels": [1, 0.5]}, r"1 \(object\), 0 \(background\)"),
    ({"point_coords": [5, 5], "point_labels": [1]}, r"point_coords has shape \(2,\) but must be \(any, 2\)"),
    ({"point_coords": np.zeros((0, 2)), "point_labels": []}, r"point_coords has shape \(0, 2\)"),
    ({"point_coords": [[5, 5], [5]], "point_labels": [1, 1]}, "point_coords is not an array of numbers"),
    (
        {"mask_input": np.zeros((1, 256, 256))},
        r"mask_input has shape \(1, 256, 256\) but must be \(1, 32, 32\)",
    ),
    ({"mask_input": np.zeros((32, 32))}, r"mask_input has shape \(32, 32\) but must be \(1, 32, 32\)"),
    ({"mask_input": np.full((1, 32, 32), np.nan)}, "mask_input contains NaN or infinity"),
]


@pytest.mark.parametrize(("prompt", "sentence"), ONE)
def test_wrong_prompt(predictor, prompt, sentence):
    with pytest.raises(ValueError, match=sentence):
        predictor.predict(**prompt)


MANY = [
    ({}, "No prompt was given"),
    ({"boxes": BOX}, r"boxes has shape \(4,\) but must be \(any, 4\)"),
    ({"boxes": np.zeros((0, 4))}, r"boxes has shape \(0, 4\) but must be \(any, 4\), none of them 0"),
    ({"boxes": [BOX, [1, 2, np.nan, 4]]}, "boxes contains NaN"),
    ({"boxes": [BOX, [9, 2, 5, 4]]}, r"box \[9, 2, 5, 4\] has x1 <= x0"),
    ({"boxes": [BOX, [90, 2, 95, 4]]}, r"box \[90, 2, 95, 4\] lies outside"),
    (
        {"point_coords": [COORDS], "point_labels": [LABELS, LABELS]},
        r"point_labels has shape \(2, 2\) but must",
    ),
    ({"boxes": [BOX, BOX], "mask_input": np.zeros((1, 1, 32, 32))}, r"number \[1, 2\]; give each kind"),
    ({"boxes": [BOX, BOX], "point_coords": [COORDS], "point_labels": [LABELS]}, r"number \[1, 2\]"),
    (
        {"mask_input": np.zeros((2, 32, 32))},
        r"mask_input has shape \(2, 32, 32\) but must be \(any, 1, 32, 32\)",
    ),
]


@pytest.mark.parametrize(("prompts", "sentence"), MANY)
def test_wrong_batch(predictor, prompts, sentence):
    with pytest.raises(ValueError, match=sentence):
        predictor.predict_batch(**prompts)


def test_a_wrong_prompt_leaves_the_image(predictor):
    with pytest.raises(ValueError, match="No prompt"):
        predictor.predict()
    assert predictor.predict(box=BOX)[0].shape == (3, HEIGHT, WIDTH)


def test_wrong_models(model):
    with pytest.raises(TypeError, match=r"SamPredictor\(sam, params\).*but got Sam without params"):
        SamPredictor(model.sam)
    with pytest.raises(TypeError, match="complete model .* alone, but got SamModel with params"):
        SamPredictor(model, model.params)
    with pytest.raises(TypeError, match="but got tuple without params"):
        SamPredictor((model.sam, model.params))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="but got NoneType without params"):
        SamPredictor(None)  # type: ignore[arg-type]
