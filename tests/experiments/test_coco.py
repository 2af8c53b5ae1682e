"""Datasets and box prompts: what is read, what is repaired, and the sentence for everything else."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from experiments.coco import (
    CocoDataset,
    annotated_boxes,
    load_boxes,
    load_coco,
    load_detections,
    stream_images,
)


def example_document():
    """Two images, two polygons and a crowd; category ids with a gap, as COCO's."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "height": 40, "width": 60},
            {"id": 9, "file_name": "b.png", "height": 30, "width": 30},
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 1,
                "bbox": [10, 5, 20, 10],
                "segmentation": [[10, 5, 30, 5, 30, 15, 10, 15]],
                "area": 200,
                "iscrowd": 0,
            },
            {
                "id": 2,
                "image_id": 9,
                "category_id": 3,
                "bbox": [0, 0, 10, 10],
                "segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]],
                "iscrowd": 0,
            },
            {
                "id": 3,
                "image_id": 9,
                "category_id": 3,
                "bbox": [0, 0, 30, 30],
                "segmentation": {"size": [30, 30], "counts": [0, 900]},
                "area": 900,
                "iscrowd": 1,
            },
        ],
        "categories": [{"id": 1, "name": "one"}, {"id": 3, "name": "three"}],
    }


def write_folder(folder: Path, document) -> tuple[Path, Path]:
    images = folder / "images"
    images.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for record in example_document()["images"]:
        pixels = rng.integers(0, 256, (record["height"], record["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / record["file_name"])
    path = folder / "annotations.json"
    path.write_text(json.dumps(document))
    return images, path


def in_memory(document=None, **options) -> CocoDataset:
    document = document or example_document()
    images = [np.zeros((r["height"], r["width"], 3), np.uint8) for r in document["images"]]
    return CocoDataset.from_memory(images, document, **options)


def test_loads_a_folder_without_prints(tmp_path, capfd):
    dataset = load_coco(*write_folder(tmp_path, example_document()))
    assert capfd.readouterr().out == ""
    assert [item.image_id for item in dataset.items] == [7, 9]
    assert dataset.items[0].annotations[0].box == (10, 5, 30, 15)
    assert dataset.items[1].annotations[1].iscrowd
    image = dataset.read_image(dataset.items[0])
    assert image.shape == (40, 60, 3) and image.dtype == np.uint8
    assert dataset.notes() == ()


def test_limit_keeps_the_first_images_and_knows_the_rest(tmp_path):
    dataset = load_coco(*write_folder(tmp_path, example_document()), limit=1)
    assert [item.image_id for item in dataset.items] == [7]
    assert dataset.listed_ids == {7, 9}
    assert list(dataset.coco.anns) == [1]


def test_masks_of_all_encodings_agree():
    mask = np.zeros((40, 60), np.uint8)
    mask[5:15, 10:30] = 1
    compressed = mask_utils.encode(np.asfortranarray(mask))
    runs = [0] if mask.T.flat[0] else []
    flat = mask.T.ravel()
    borders = np.flatnonzero(np.diff(flat)) + 1
    runs += np.diff(np.r_[0, borders, flat.size]).tolist()
    for segmentation in (
        [[10, 5, 30, 5, 30, 15, 10, 15]],
        {"size": [40, 60], "counts": compressed["counts"].decode()},
        {"size": [40, 60], "counts": runs},
    ):
        document = example_document()
        document["annotations"][0]["segmentation"] = segmentation
        rle = in_memory(document).ground_truth_rle(1)
        np.testing.assert_array_equal(mask_utils.decode(rle), mask)


def test_missing_area_is_that_of_the_mask():
    dataset = in_memory()
    assert dataset.coco.anns[2]["area"] == 100


@pytest.mark.parametrize("ids", [[0, 1, 2], [1, 1, 2], [None, 2, 3]])
def test_unusable_annotation_ids_are_replaced(ids):
    document = example_document()
    for annotation, new in zip(document["annotations"], ids, strict=True):
        annotation["id"] = new
    assert sorted(in_memory(document).coco.anns) == [1, 2, 3]


def test_boxes_are_clipped_and_counted():
    document = example_document()
    document["annotations"][0]["bbox"] = [-5, 5, 100, 10]
    document["annotations"][1]["bbox"] = [3, 3, 0, 5]
    dataset = in_memory(document)
    assert dataset.items[0].annotations[0].box == (0, 5, 60, 15)
    assert (dataset.clipped_boxes, dataset.degenerate_boxes) == (1, 1)
    assert len(dataset.notes()) == 2
    boxes = annotated_boxes(dataset)
    assert len(boxes) == 1  # neither the crowd nor the box without width


def test_fingerprint_depends_on_pixels_and_annotations():
    document = example_document()
    first = in_memory(document)
    assert first.fingerprint == in_memory(example_document()).fingerprint
    brighter = [np.ones((40, 60, 3), np.uint8), np.zeros((30, 30, 3), np.uint8)]
    assert CocoDataset.from_memory(brighter, document).fingerprint != first.fingerprint
    document["annotations"][0]["bbox"] = [10, 5, 20, 11]
    assert in_memory(document).fingerprint != first.fingerprint


def test_the_callers_document_is_left_alone():
    document = example_document()
    dataset = in_memory(document)
    dataset.ground_truth_rle(1)
    assert document == example_document()


def test_a_box_thinner_than_float32_is_no_prompt(tmp_path):
    document = example_document()
    document["annotations"][0]["bbox"] = [50, 5, 1e-9, 10]
    assert len(annotated_boxes(in_memory(document))) == 1
    path = write_detections(tmp_path, [detection(), detection(bbox=(50, 5, 1e-9, 10))])
    assert len(load_boxes(path, in_memory())) == 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16", "LA"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    images, path = write_folder(tmp_path, example_document())
    dataset = load_coco(images, path)
    grey = np.tile(np.arange(60, dtype=np.uint8) * 4, (40, 1))
    if mode == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(grey).convert("RGB").convert(mode)
    picture.save(images / "a.png", format="TIFF" if mode == "CMYK" else "PNG")
    image = dataset.read_image(dataset.items[0])
    assert image.shape == (40, 60, 3) and image.dtype == np.uint8
    if mode in ("L", "I;16", "LA"):
        np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, axis=2))


def test_exif_rotation_is_applied_when_the_annotation_means_it(tmp_path):
    images, path = write_folder(tmp_path, example_document())
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:, :30] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored picture is turned by 90 degrees
    Image.fromarray(np.rot90(upright).copy()).save(images / "a.png", exif=exif)
    image = load_coco(images, path).read_image(load_coco(images, path).items[0])
    np.testing.assert_array_equal(image, upright)


def test_stream_reads_in_order_and_passes_errors_on(tmp_path):
    images, path = write_folder(tmp_path, example_document())
    dataset = load_coco(images, path)
    assert [item.image_id for item, _ in stream_images(dataset)] == [7, 9]
    (images / "b.png").write_bytes(b"")
    stream = stream_images(dataset)
    assert next(stream)[0].image_id == 7
    with pytest.raises(ValueError, match="b.png"):
        next(stream)


def document_with(change):
    document = example_document()
    change(document)
    return document


def set_annotation(**fields):
    return lambda document: document["annotations"][0].update(fields)


def set_image(**fields):
    return lambda document: document["images"][0].update(fields)


BAD_DOCUMENTS = {
    "no annotations key": (lambda d: d.pop("annotations"), 'no list "annotations"'),
    "no images key": (lambda d: d.pop("images"), 'no list "images"'),
    "no images": (lambda d: d.update(images=[]), "lists no images"),
    "zero annotations": (lambda d: d.update(annotations=[]), "has no annotations"),
    "unknown image": (set_annotation(image_id=8), "belongs to image 8, which the file does not list"),
    "unhashable image": (set_annotation(image_id=[7]), "which the file does not list"),
    "unknown category": (set_annotation(category_id=2), "category 2, which the file does not define"),
    "box of three": (set_annotation(bbox=[1, 2, 3]), "four finite numbers"),
    "box of text": (set_annotation(bbox=["a", 1, 2, 3]), "four finite numbers"),
    "NaN box": (set_annotation(bbox=[math.nan, 1, 2, 3]), "four finite numbers"),
    "infinite box": (set_annotation(bbox=[0, 1, math.inf, 3]), "four finite numbers"),
    "negative box": (set_annotation(bbox=[5, 5, -2, 3]), "negative size"),
    "box right of the image": (set_annotation(bbox=[60, 5, 4, 3]), "outside its 60x40 image"),
    "box above the image": (set_annotation(bbox=[5, -9, 4, 3]), "outside its 60x40 image"),
    "no mask": (set_annotation(segmentation=[]), "no valid mask"),
    "polygon of two points": (set_annotation(segmentation=[[1, 1, 5, 5]]), "no valid mask"),
    "odd polygon": (set_annotation(segmentation=[[1, 1, 5, 5, 3, 3, 2]]), "no valid mask"),
    "mask of another size": (
        set_annotation(segmentation={"size": [4, 4], "counts": [0, 16]}),
        "mask of size",
    ),
    "short run lengths": (set_annotation(segmentation={"size": [40, 60], "counts": [5, 5]}), "no valid mask"),
    "short compressed mask": (
        set_annotation(segmentation={"size": [40, 60], "counts": "abc"}),
        "no valid mask",
    ),
    "garbage compressed mask": (
        set_annotation(segmentation={"size": [40, 60], "counts": "é!"}),
        "no valid mask",
    ),
    "annotation is a list": (lambda d: d["annotations"].append([]), "lacks image_id"),
    "no box": (lambda d: d["annotations"][0].pop("bbox"), "lacks image_id, category_id or bbox"),
    "no height": (set_image(height=None), "no positive whole height"),
    "double image": (lambda d: d["images"].append(d["images"][0]), "image id twice"),
    "no image id": (lambda d: d["images"][0].pop("id"), "no integer id"),
    "no file name": (set_image(file_name=None), "no file_name"),
    "bad categories": (lambda d: d.update(categories=[1]), "malformed categories"),
}


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_a_bad_document_gets_one_sentence(tmp_path, name):
    change, message = BAD_DOCUMENTS[name]
    images, path = write_folder(tmp_path, document_with(change))
    with pytest.raises(ValueError, match=message) as caught:
        load_coco(images, path)
    text = str(caught.value)
    assert "annotations.json" in text and text.endswith(".") and "\n" not in text


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "--boxes"),
        ("3", "no object"),
        ('{"images": [', "not readable as JSON"),
        ("\x00", "not readable"),
    ],
)
def test_a_file_that_is_no_coco_document(tmp_path, content, message):
    images, path = write_folder(tmp_path, example_document())
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_coco(images, path)


def test_absent_files_name_their_flag(tmp_path):
    images, path = write_folder(tmp_path, example_document())
    with pytest.raises(FileNotFoundError, match="--calib_images"):
        load_coco(tmp_path / "nowhere", path, images_flag="--calib_images")
    with pytest.raises(FileNotFoundError, match="is a file"):
        load_coco(path, path)
    with pytest.raises(FileNotFoundError, match="--annotations"):
        load_coco(images, tmp_path / "nowhere.json")
    (images / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of the 2 images .* b.png"):
        load_coco(images, path)
    assert len(load_coco(images, path, limit=1).items) == 1
    with pytest.raises(ValueError, match="limit"):
        load_coco(images, path, limit=0)


def test_unreadable_images_get_one_sentence(tmp_path):
    images, path = write_folder(tmp_path, example_document())
    dataset = load_coco(images, path)
    item = dataset.items[0]
    whole = (images / "a.png").read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "damaged or cut off"),
        (b"not an image", "not an image"),
    ):
        (images / "a.png").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            dataset.read_image(item)
    Image.new("RGB", (50, 40)).save(images / "a.png")
    with pytest.raises(ValueError, match="50x40 pixels but .* 60x40"):
        dataset.read_image(item)
    (images / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match="a.png"):
        dataset.read_image(item)


def test_wrong_arrays_get_one_sentence():
    document = example_document()
    with pytest.raises(ValueError, match="1 arrays but lists 2 images"):
        CocoDataset.from_memory([np.zeros((40, 60, 3), np.uint8)], document)
    floats = [np.zeros((40, 60, 3)), np.zeros((30, 30, 3))]
    dataset = CocoDataset.from_memory(floats, document)
    with pytest.raises(ValueError, match="float64"):
        dataset.read_image(dataset.items[0])


def test_boxes_alone_suffice_for_calibration(tmp_path):
    document = example_document()
    for annotation in document["annotations"]:
        annotation.pop("segmentation")
    dataset = load_coco(*write_folder(tmp_path, document), require_masks=False)
    assert len(annotated_boxes(dataset)) == 2
    with pytest.raises(ValueError, match="has no mask"):
        dataset.ground_truth_rle(1)


def detection(image_id=7, category_id=1, bbox=(10, 5, 20, 10), score=0.5):
    return {"image_id": image_id, "category_id": category_id, "bbox": list(bbox), "score": score}


def write_detections(tmp_path, entries):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(entries))
    return path


def test_detections_are_sorted_limited_and_clipped(tmp_path):
    entries = [
        detection(score=0.2),
        detection(score=0.9, bbox=(50, 30, 20, 20)),
        detection(score=0.6),
        detection(score=0.01),
        detection(image_id=9, category_id=3, bbox=(0, 0, 5, 5)),
        detection(image_id=1234),
        detection(bbox=(5, 5, 0, 3)),
    ]
    boxes = load_detections(write_detections(tmp_path, entries), in_memory(), max_per_image=2, min_score=0.05)
    first = boxes.per_image[7]
    np.testing.assert_array_equal(first.scores, [0.9, 0.6])
    np.testing.assert_array_equal(first.boxes[0], [50, 30, 60, 40])
    assert len(boxes) == 3 and not boxes.from_annotations
    assert len(boxes.notes) == 5


def test_detections_beyond_the_limit_are_not_unknown(tmp_path):
    path = write_detections(tmp_path, [detection(), detection(image_id=9, category_id=3)])
    assert load_boxes(path, in_memory(limit=1)).notes == ()


BAD_DETECTIONS = {
    "object": ({"boxes": []}, "must hold a list"),
    "empty": ([], "No box is left"),
    "no score": ([{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4]}], "lacks score"),
    "number": ([3], "is not an object"),
    "box of three": ([detection(bbox=(1, 2, 3))], "four finite numbers"),
    "NaN": ([detection(bbox=(1, 2, math.nan, 4))], "four finite numbers"),
    "negative": ([detection(bbox=(1, 2, -3, 4))], "negative size"),
    "score NaN": ([detection(score=math.nan)], "the score nan"),
    "score above one": ([detection(score=30)], "between 0 and 1"),
    "text id": ([detection(image_id="7")], "not a whole number"),
    "class index": ([detection(category_id=0)], "category 0"),
    "unknown images": ([detection(image_id=1)], "image ids are not those"),
    "low scores": ([detection(score=0.01)], "1 of them below the score 0.05"),
    "corners": ([detection(bbox=(20, 10, 50, 38)), detection(bbox=(5, 5, 8, 9))], "fit as"),
}


@pytest.mark.parametrize("name", BAD_DETECTIONS)
def test_bad_detections_get_one_sentence(tmp_path, name):
    entries, message = BAD_DETECTIONS[name]
    path = write_detections(tmp_path, entries)
    with pytest.raises(ValueError, match=message) as caught:
        load_boxes(path, in_memory(), min_score=0.05)
    text = str(caught.value)
    assert "boxes.json" in text and text.endswith(".") and "\n" not in text


def test_absent_detections_name_their_flag(tmp_path):
    with pytest.raises(FileNotFoundError, match="--boxes"):
        load_boxes(tmp_path / "nowhere.json", in_memory())
    with pytest.raises(ValueError, match="at least 1"):
        load_detections(write_detections(tmp_path, [detection()]), in_memory(), max_per_image=0)


def test_only_crowds_give_no_prompt():
    document = example_document()
    for annotation in document["annotations"]:
        annotation["iscrowd"] = 1
    with pytest.raises(ValueError, match="--boxes"):
        load_boxes("gt", in_memory(document))
