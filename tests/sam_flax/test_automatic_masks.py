"""`SamAutomaticMaskGenerator`: segment_anything's records on the same weights, and each step by definition."""

import inspect
import json
import sys

import numpy as np
import pytest
from pycocotools import mask as coco

from sam_flax import Sam, SamAutomaticMaskGenerator, SamModel
from sam_flax import automatic_masks as amg
from sam_flax import sam as sam_module
from sam_flax.errors import InputError
from sam_flax.files.convert import convert


def picture() -> np.ndarray:
    """The image of the stored records."""
    y, x = np.mgrid[:96, :131]
    return np.stack([127 + 120 * np.sin(x / 9), 127 + 120 * np.cos(y / 13), (x * y) % 251], -1).astype(np.uint8)


@pytest.fixture(scope="module")
def model(golden) -> SamModel:
    """`sam_tiny`, with logits far from 0 and predicted IoU near 1."""
    state = golden("sam_tiny_weights_s0")
    for name in state:
        if "output_hypernetworks_mlps" in name and ".layers.2." in name:
            state[name] = state[name] * 200
        if "iou_prediction_head.layers.2.bias" in name:
            state[name] = state[name] + np.float32(0.9)
    config, params = convert(state, decoder_num_heads=4)
    return SamModel(Sam(config), params)


@pytest.mark.parametrize("case", range(3))
def test_records_are_the_official_ones(model, data_dir, case):
    """segment_anything's own, on these weights; test_official_parity.py compares afresh where PyTorch is installed."""
    stored = json.loads((data_dir / "automatic_masks_s0.json").read_text())[case]
    records = SamAutomaticMaskGenerator(model, **stored["arguments"]).generate(picture())
    assert len(records) == len(stored["records"]) > 3
    for got, want in zip(records, stored["records"], strict=True):
        assert list(got) == list(want)
        assert [abs(a - b) <= 1 for a, b in zip(got["bbox"], want["bbox"], strict=True)] == [True] * 4
        assert got["crop_box"] == want["crop_box"] and got["point_coords"] == want["point_coords"]
        assert got["predicted_iou"] == pytest.approx(want["predicted_iou"], abs=1e-5)
        assert got["stability_score"] == pytest.approx(want["stability_score"], abs=1e-3)
        # A logit near 0 may fall to either side on another machine.
        assert coco.iou([got["segmentation"]], [want["segmentation"]], [0])[0, 0] > 0.99
        assert abs(got["area"] - want["area"]) <= 0.01 * want["area"] + 1


def test_signature_is_segment_anythings():
    parameters = inspect.signature(SamAutomaticMaskGenerator).parameters
    assert {name: p.default for name, p in parameters.items() if name not in ("model", "params")} == {
        "points_per_side": 32,
        "points_per_batch": 64,
        "pred_iou_thresh": 0.88,
        "stability_score_thresh": 0.95,
        "stability_score_offset": 1.0,
        "box_nms_thresh": 0.7,
        "crop_n_layers": 0,
        "crop_nms_thresh": 0.7,
        "crop_overlap_ratio": 512 / 1500,
        "crop_n_points_downscale_factor": 1,
        "point_grids": None,
        "min_mask_region_area": 0,
        "output_mode": "binary_mask",
    }


KEEP_ALL = {"pred_iou_thresh": -1.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}


def test_output_modes_hold_the_same_masks(model):
    def generate(mode: str) -> list:
        return SamAutomaticMaskGenerator(model, 2, output_mode=mode, **KEEP_ALL).generate(picture())  # type: ignore[arg-type]

    binary, runs, packed = (generate(mode) for mode in ("binary_mask", "uncompressed_rle", "coco_rle"))
    assert len(binary) == len(runs) == len(packed) == 12
    for one, two, three in zip(binary, runs, packed, strict=True):
        mask = one["segmentation"]
        assert mask.shape == (96, 131) and mask.dtype == np.bool_
        np.testing.assert_array_equal(amg.counts_to_mask(two["segmentation"]["counts"], (96, 131)), mask)
        np.testing.assert_array_equal(coco.decode(three["segmentation"]), mask)
        json.dumps([two, three])
        assert one["area"] == mask.sum()
        x, y, w, h = one["bbox"]
        rows, columns = np.nonzero(mask)
        assert (x, y, x + w, y + h) == (columns.min(), rows.min(), columns.max(), rows.max())
    ious = [record["predicted_iou"] for record in binary]
    assert ious == sorted(ious, reverse=True)


def test_one_compilation_serves_all_batches(model):
    """Seven points a batch, of a grid of 25 and one of 9: the last batches are filled up."""
    before = sam_module.apply_decode._cache_size()
    for side in (5, 3):
        SamAutomaticMaskGenerator(model, side, points_per_batch=7).generate(picture())
    assert sam_module.apply_decode._cache_size() - before == 1


def test_batches_do_not_matter(model):
    records = [
        SamAutomaticMaskGenerator(model, 3, points_per_batch=n, output_mode="coco_rle", **KEEP_ALL).generate(picture())
        for n in (2, 9)
    ]
    assert len(records[0]) == len(records[1]) == 27
    for one, two in zip(*records, strict=True):
        assert one["point_coords"] == two["point_coords"]
        assert one["predicted_iou"] == pytest.approx(two["predicted_iou"], abs=1e-5)


def test_every_model_is_taken(model):
    """Anything with the methods of `MaskModel`; a `Sam` comes with its parameters."""

    class Other:
        config, encode_image, decode = model.config, model.encode_image, model.decode

    arguments = {"points_per_side": 2, "output_mode": "coco_rle", **KEEP_ALL}
    want = SamAutomaticMaskGenerator(model, **arguments).generate(picture())
    assert SamAutomaticMaskGenerator(Other(), **arguments).generate(picture()) == want
    assert SamAutomaticMaskGenerator(model.sam, params=model.params, **arguments).generate(picture()) == want
    with pytest.raises(TypeError, match="params"):
        SamAutomaticMaskGenerator(model.sam, **arguments)


def test_images_without_masks_and_of_few_pixels(model):
    assert SamAutomaticMaskGenerator(model, 2, pred_iou_thresh=10.0, crop_n_layers=1).generate(picture()) == []
    for height, width in ((1, 1), (1, 7), (3, 2)):
        image = np.full((height, width, 3), 90, np.uint8)
        generator = SamAutomaticMaskGenerator(model, 2, crop_n_layers=2, min_mask_region_area=2, **KEEP_ALL)
        for record in generator.generate(image):
            assert record["segmentation"].shape == (height, width)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"points_per_side": None}, "Exactly one of points_per_side and point_grids"),
        ({"point_grids": [[[0.5, 0.5]]]}, "Exactly one of points_per_side and point_grids"),
        ({"points_per_side": 0}, "points_per_side=0 must be a whole number of at least 1"),
        ({"points_per_side": 1.5}, "points_per_side=1.5"),
        ({"points_per_batch": 0}, "points_per_batch=0"),
        ({"crop_n_layers": -1}, "crop_n_layers=-1"),
        ({"crop_n_points_downscale_factor": 0}, "crop_n_points_downscale_factor=0"),
        ({"min_mask_region_area": -1}, "min_mask_region_area=-1"),
        ({"crop_overlap_ratio": 1.0}, "crop_overlap_ratio=1.0"),
        ({"output_mode": "png"}, "output_mode='png' is unknown; use binary_mask"),
        ({"points_per_side": None, "point_grids": []}, "point_grids has 0 grids for 1 layers"),
        ({"points_per_side": None, "point_grids": [[[0.5, 0.5]]], "crop_n_layers": 1}, "has 1 grids for 2 layers"),
        ({"points_per_side": None, "point_grids": [[[50, 50]]]}, "shares of the image's width and height"),
        ({"points_per_side": None, "point_grids": ["grid"]}, "shares of the image's width and height"),
    ],
)
def test_wrong_arguments(model, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        SamAutomaticMaskGenerator(model, **arguments)


@pytest.mark.parametrize(("library", "arguments"), [("cv2", {}), ("pycocotools", {"output_mode": "coco_rle"})])
def test_a_library_that_is_missing_is_named(model, monkeypatch, library, arguments):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"pip install .*{'opencv' if library == 'cv2' else library}"):
        SamAutomaticMaskGenerator(model, **arguments)


def test_wrong_image(model):
    with pytest.raises(InputError, match="uint8"):
        SamAutomaticMaskGenerator(model, 2).generate(np.zeros((4, 4)))


# ------------------------------------------------------------------------------------------------------- the steps


def test_runs_and_back():
    rng = np.random.default_rng(0)
    for mask in (
        *(rng.random((5, 7)) > share for share in (0.2, 0.5, 0.9)),
        np.ones((3, 4), bool),
        np.zeros((3, 4), bool),
    ):
        counts = amg.mask_to_counts(mask)
        assert sum(counts) == mask.size and sum(counts[1::2]) == mask.sum()
        np.testing.assert_array_equal(amg.counts_to_mask(counts, mask.shape), mask)
        packed = coco.frPyObjects({"size": list(mask.shape), "counts": counts}, *mask.shape)
        np.testing.assert_array_equal(coco.decode(packed), mask)


def test_suppression_by_definition():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 30, (40, 2))
    boxes = [
        (int(x), int(y), int(x + w), int(y + h))
        for (x, y), (w, h) in zip(corners, rng.integers(0, 30, (40, 2)), strict=True)
    ]
    scores = np.round(rng.random(40) - 0.5, 1).tolist()  # some equal, some below 0

    def iou(a, b) -> float:
        w = min(a[2], b[2]) - max(a[0], b[0])
        h = min(a[3], b[3]) - max(a[1], b[1])
        shared = max(w, 0) * max(h, 0)
        whole = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
        return shared / whole if whole else 0.0

    for threshold in (0.1, 0.33, 0.7, 1.0):
        want: list[int] = []
        for i in sorted(range(40), key=lambda i: (-scores[i], i)):
            if all(iou(boxes[i], boxes[k]) <= threshold for k in want):
                want.append(i)
        assert amg.suppress(boxes, scores, threshold) == want
    assert amg.suppress([], [], 0.5) == []


def test_small_regions():
    mask = np.zeros((12, 12), bool)
    mask[1:9, 1:9] = True
    mask[3, 3] = mask[5:7, 5:7] = False  # holes of 1 and 4 pixels
    mask[11, 11] = True  # an island
    filled, changed = amg.remove_small_regions(mask, 2, "holes")
    assert changed and filled[3, 3] and not filled[5, 5] and filled[11, 11]
    cleared, changed = amg.remove_small_regions(mask, 2, "islands")
    assert changed and not cleared[11, 11] and cleared[1, 1] and not cleared[3, 3]
    same, changed = amg.remove_small_regions(mask, 1, "islands")
    assert not changed and same is mask
    dots = np.zeros((5, 5), bool)
    dots[0, 0] = dots[3:, 3] = True
    largest, _ = amg.remove_small_regions(dots, 10, "islands")
    assert largest.sum() == 2 and largest[3, 3]


def test_stability_is_an_iou_of_two_thresholds():
    logits = np.array([[-2.0, -0.5, 0.5, 2.0]])
    assert amg.calculate_stability_score(logits, 0.0, 1.0) == 1 / 3
    assert np.isnan(amg.calculate_stability_score(logits, 9.0, 1.0))


def test_crops_cover_the_image():
    boxes, layers = amg.generate_crop_boxes((96, 131), 2, 512 / 1500)
    assert boxes[0] == (0, 0, 131, 96) and layers == [0] + [1] * 4 + [2] * 16
    for layer in (1, 2):
        covered = np.zeros((96, 131), int)
        for (x0, y0, x1, y1), of in zip(boxes, layers, strict=True):
            covered[y0:y1, x0:x1] += of == layer
        assert covered.min() == 1 and covered.max() == 4
    assert amg.is_box_near_crop_edge((60, 0, 79, 9), (50, 0, 80, 96), (0, 0, 131, 96))
    assert not amg.is_box_near_crop_edge((0, 0, 20, 20), (0, 0, 80, 96), (0, 0, 131, 96))
