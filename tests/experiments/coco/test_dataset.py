"""Datasets: what is read, what is repaired, and the sentence for everything else."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from experiments.coco import CocoDataset, annotated_boxes, load_coco, stream_images


def test_loads_a_folder_without_prints(tmp_path, capfd, example_document, write_folder):
    dataset = load_coco(*write_folder(tmp_path, example_document()))
    assert capfd.readouterr().out == ""
    assert [item.image_id for item in dataset.items] == [7, 9]
    assert dataset.items[0].annotations[0].box == (10, 5, 30, 15)
    assert dataset.items[1].annotations[1].iscrowd
    image = dataset.read_image(dataset.items[0])
    assert image.shape == (40, 60, 3) and image.dtype == np.uint8
    assert dataset.notes() == ()


def test_limit_keeps_the_first_images_and_knows_the_rest(tmp_path, example_document, write_folder):
    dataset = load_coco(*write_folder(tmp_path, example_document()), limit=1)
    assert [item.image_id for item in dataset.items] == [7]
    assert dataset.listed_ids == {7, 9}
    assert list(dataset.coco.anns) == [1]


def test_masks_of_all_encodings_agree(example_document, in_memory):
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


def test_boxes_are_clipped_and_counted(example_document, in_memory):
    document = example_document()
    document["annotations"][0]["bbox"] = [-5, 5, 100, 10]
    document["annotations"][1]["bbox"] = [3, 3, 0, 5]
    dataset = in_memory(document)
    assert dataset.items[0].annotations[0].box == (0, 5, 60, 15)
    assert (dataset.clipped_boxes, dataset.degenerate_boxes) == (1, 1)
    notes = dataset.notes()
    assert len(notes) == 3 and "2 boxes overlap the box around their own mask by less than half" in notes[1]
    boxes = annotated_boxes(dataset)
    assert len(boxes) == 1  # neither the crowd nor the box without width


def test_fingerprint_depends_on_pixels_and_annotations(example_document, in_memory):
    document = example_document()
    first = in_memory(document)
    assert first.fingerprint == in_memory(example_document()).fingerprint
    brighter = [np.ones((40, 60, 3), np.uint8), np.zeros((30, 30, 3), np.uint8)]
    assert CocoDataset.from_memory(brighter, document).fingerprint != first.fingerprint
    document["annotations"][0]["bbox"] = [10, 5, 20, 11]
    assert in_memory(document).fingerprint != first.fingerprint


def test_the_callers_document_is_left_alone(example_document, in_memory):
    document = example_document()
    dataset = in_memory(document)
    dataset.ground_truth_rle(1)
    assert document == example_document()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16", "LA"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode, example_document, write_folder):
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


def test_exif_rotation_is_applied_when_the_annotation_means_it(tmp_path, example_document, write_folder):
    images, path = write_folder(tmp_path, example_document())
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:, :30] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored picture is turned by 90 degrees
    Image.fromarray(np.rot90(upright).copy()).save(images / "a.png", exif=exif)
    image = load_coco(images, path).read_image(load_coco(images, path).items[0])
    np.testing.assert_array_equal(image, upright)


def test_stream_reads_in_order_and_passes_errors_on(tmp_path, example_document, write_folder):
    images, path = write_folder(tmp_path, example_document())
    dataset = load_coco(images, path)
    assert [item.image_id for item, _ in stream_images(dataset)] == [7, 9]
    (images / "b.png").write_bytes(b"")
    stream = stream_images(dataset)
    assert next(stream)[0].image_id == 7
    with pytest.raises(ValueError, match="b.png"):
        next(stream)


def test_absent_files_name_their_flag(tmp_path, example_document, write_folder):
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


def test_unreadable_images_get_one_sentence(tmp_path, example_document, write_folder):
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


def test_wrong_arrays_get_one_sentence(example_document):
    document = example_document()
    with pytest.raises(ValueError, match="1 arrays but lists 2 images"):
        CocoDataset.from_memory([np.zeros((40, 60, 3), np.uint8)], document)
    floats = [np.zeros((40, 60, 3)), np.zeros((30, 30, 3))]
    dataset = CocoDataset.from_memory(floats, document)
    with pytest.raises(ValueError, match="float64"):
        dataset.read_image(dataset.items[0])


def test_boxes_alone_suffice_for_calibration(tmp_path, example_document, write_folder):
    document = example_document()
    for annotation in document["annotations"]:
        annotation.pop("segmentation")
    dataset = load_coco(*write_folder(tmp_path, document), require_masks=False)
    assert len(annotated_boxes(dataset)) == 2
    with pytest.raises(ValueError, match="has no mask"):
        dataset.ground_truth_rle(1)
