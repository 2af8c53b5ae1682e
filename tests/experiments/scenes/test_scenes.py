"""The scenes must be reproducible, well formed, visible, and impossible to solve from their boxes."""

import contextlib
import io
import json
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from experiments.scenes import outlines, scenes

SIZE = 128


def coco_object(dataset: dict) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def mask_ap(coco: COCO, draw: Callable[[dict, tuple[int, int]], np.ndarray]) -> float:
    """COCO mask AP (IoU .5:.95, in percent) when each object's mask is drawn from its annotation alone."""
    results = []
    for annotation in coco.dataset["annotations"]:
        image = coco.imgs[annotation["image_id"]]
        mask = draw(annotation, (image["height"], image["width"]))
        results.append(
            {
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "segmentation": scenes.encode_mask(mask),
                "score": 1.0,
            }
        )
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * float(evaluation.stats[0])


def draw_box(annotation: dict, shape: tuple[int, int]) -> np.ndarray:
    x, y, width, height = (round(value) for value in annotation["bbox"])
    mask = np.zeros(shape, bool)
    mask[y : y + height, x : x + width] = True
    return mask


def draw_ellipse(annotation: dict, shape: tuple[int, int]) -> np.ndarray:
    """The ellipse inscribed in the annotation's box."""
    x, y, width, height = annotation["bbox"]
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    across = (columns + 0.5 - x - width / 2) / (width / 2)
    down = (rows + 0.5 - y - height / 2) / (height / 2)
    return across**2 + down**2 <= 1


@pytest.fixture(scope="module")
def some_scenes() -> list[scenes.Scene]:
    return list(scenes.scene_dataset(scenes.EVAL_SEED, 20, SIZE))


def test_scene_depends_only_on_seed_and_index(some_scenes):
    for index in (7, 3):  # against the order of the fixture
        again = scenes.make_scene(scenes.EVAL_SEED, index, SIZE)
        np.testing.assert_array_equal(again.image, some_scenes[index].image)
        np.testing.assert_array_equal(again.masks, some_scenes[index].masks)


def test_streams_and_indices_differ():
    images = [
        scenes.make_scene(seed, index, 64).image
        for seed in (scenes.TRAIN_SEED, scenes.CALIB_SEED, scenes.EVAL_SEED)
        for index in (0, 1)
    ]
    assert len({image.tobytes() for image in images}) == len(images)


@pytest.mark.parametrize("size", [64, 128, 192])
def test_scene_is_well_formed(size):
    scene = scenes.make_scene(scenes.TRAIN_SEED, 5, size)
    assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
    assert scene.masks.shape[1:] == (size, size) and scene.masks.dtype == bool


def test_masks_are_disjoint_large_enough_and_visible(some_scenes):
    for scene in some_scenes:
        assert scenes.MIN_OBJECTS <= len(scene.masks) <= scenes.MAX_OBJECTS
        assert scene.masks.sum(0).max() == 1
        assert scene.masks.mean((1, 2)).min() >= scenes.MIN_VISIBLE_AREA
        for mask in scene.masks:
            assert scenes._outline_visibility(scene.image, mask) >= scenes.MIN_VISIBLE_OUTLINE


def test_outline_visibility_tells_visible_from_hidden():
    mask = np.zeros((64, 64), bool)
    mask[20:40, 20:40] = True
    image = np.full((64, 64, 3), 100, np.uint8)
    assert scenes._outline_visibility(image, mask) == 0
    image[mask] = 180
    assert scenes._outline_visibility(image, mask) == 1


@pytest.mark.parametrize("outline", [outline for outline, _ in outlines.OUTLINES], ids=lambda f: f.__name__)
def test_every_outline_fits_its_patch_and_has_substance(outline, monkeypatch):
    monkeypatch.setattr(outlines, "OUTLINES", ((outline, 1.0),))
    for index in range(5):
        coverage = outlines.rasterise(outlines.random_shape(np.random.default_rng(index)), 60.0)
        assert coverage.min() >= 0 and coverage.max() == 1
        assert coverage.mean() > 0.08
        frame = np.concatenate([coverage[0], coverage[-1], coverage[:, 0], coverage[:, -1]])
        assert frame.max() == 0  # nothing is cut off
        assert np.any((coverage > 0) & (coverage < 1))  # soft edges


def test_ring_has_a_hole():
    coverage = outlines.rasterise([outlines.Layer([outlines.circle(0.5, 0.5), outlines.circle(0.2, 0.2)])], 60.0)
    assert coverage[32, 32] == 0 and coverage[32, 32 + 21] == 1


def test_crumbs_are_removed_and_large_pieces_kept():
    mask = np.zeros((64, 64), np.uint8)
    mask[2:20, 2:20] = mask[30:40, 30:40] = mask[60, 60] = 1
    kept = scenes._without_crumbs(mask, 5)
    assert kept.sum() == 18 * 18 + 100 and kept[60, 60] == 0


def test_boxes():
    masks = np.zeros((1, 64, 64), bool)
    masks[0, 10:21, 5:31] = True
    np.testing.assert_array_equal(scenes.boxes_xyxy(masks), [[5, 10, 31, 21]])
    np.testing.assert_array_equal(scenes.boxes_xywh(masks), [[5, 10, 26, 11]])
    np.testing.assert_array_equal(scenes.Scene(np.zeros((64, 64, 3), np.uint8), masks).boxes, [[5, 10, 31, 21]])
    assert scenes.boxes_xyxy(masks[:0]).shape == (0, 4)


def test_to_coco_round_trips(some_scenes):
    images, dataset = scenes.to_coco(some_scenes[:3])
    dataset = json.loads(json.dumps(dataset))
    coco = coco_object(dataset)
    assert len(images) == len(coco.imgs) == 3
    for image_id, scene in enumerate(some_scenes[:3], 1):
        annotations = coco.loadAnns(coco.getAnnIds(image_id))
        decoded = np.stack([coco.annToMask(annotation) for annotation in annotations]).astype(bool)
        np.testing.assert_array_equal(decoded, scene.masks)
        np.testing.assert_array_equal([a["bbox"] for a in annotations], scenes.boxes_xywh(scene.masks))
        assert [a["area"] for a in annotations] == scene.masks.sum((1, 2)).tolist()
    ids = [annotation["id"] for annotation in dataset["annotations"]]
    assert ids[0] == 1 and all(b == a + 1 for a, b in pairwise(ids))
    assert mask_ap(coco, lambda annotation, shape: coco.annToMask(annotation)) == pytest.approx(100)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        scenes.make_scene(-1, 0)
    with pytest.raises(ValueError, match="at least 64"):
        scenes.make_scene(0, 0, size=32)
    with pytest.raises(ValueError, match="mask 0 is empty"):
        scenes.boxes_xyxy(np.zeros((1, 8, 8), bool))


def test_contact_sheet_is_written(tmp_path):
    scenes.main(["--size=64", "--count=2", "--seed=1", f"--out={tmp_path / 'sheets'}"])
    assert (tmp_path / "sheets" / "scenes_1_0_64.png").stat().st_size > 1000


def test_boxes_do_not_give_shapes_away(some_scenes):
    coco = coco_object(scenes.to_coco(some_scenes)[1])
    assert mask_ap(coco, draw_ellipse) <= 15
    assert mask_ap(coco, draw_box) <= 15


@pytest.mark.slow
@pytest.mark.parametrize("size", [128, 192])
def test_boxes_do_not_give_shapes_away_at_length(size):
    coco = coco_object(scenes.to_coco(scenes.scene_dataset(scenes.EVAL_SEED, 200, size))[1])
    ellipse, box = mask_ap(coco, draw_ellipse), mask_ap(coco, draw_box)
    print(f"\nsize {size}: {len(coco.anns)} objects, ellipse AP {ellipse:.2f}, box AP {box:.2f}")
    assert ellipse <= 8
    assert box <= 8
