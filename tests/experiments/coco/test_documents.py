"""COCO's instance documents: what is repaired, and the sentence for everything else."""

import math

import pytest

from experiments.coco import load_coco


def test_missing_area_is_that_of_the_mask(in_memory):
    dataset = in_memory()
    assert dataset.coco.anns[2]["area"] == 100


@pytest.mark.parametrize("ids", [[0, 1, 2], [1, 1, 2], [None, 2, 3]])
def test_unusable_annotation_ids_are_replaced(ids, example_document, in_memory):
    document = example_document()
    for annotation, new in zip(document["annotations"], ids, strict=True):
        annotation["id"] = new
    assert sorted(in_memory(document).coco.anns) == [1, 2, 3]


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
    "no box": (lambda d: d["annotations"][0].pop("bbox"), "lacks bbox: use"),
    "no height": (set_image(height=None), "no positive whole height"),
    "double image": (lambda d: d["images"].append(d["images"][0]), "image id twice"),
    "no image id": (lambda d: d["images"][0].pop("id"), "no integer id"),
    "no file name": (set_image(file_name=None), "no file_name"),
    "bad categories": (lambda d: d.update(categories=[1]), "malformed categories"),
}


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_a_bad_document_gets_one_sentence(tmp_path, name, example_document, write_folder):
    change, message = BAD_DOCUMENTS[name]
    document = example_document()
    change(document)
    images, path = write_folder(tmp_path, document)
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
def test_a_file_that_is_no_coco_document(tmp_path, content, message, example_document, write_folder):
    images, path = write_folder(tmp_path, example_document())
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_coco(images, path)
