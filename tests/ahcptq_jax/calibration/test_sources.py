"""Every form of calibration images ends as the same items."""

import json

import numpy as np
import pytest
from PIL import Image

import ahcptq_jax
from ahcptq_jax import ImageFolder, QuantConfig
from ahcptq_jax.calibration.sources import items_of
from sam_flax import Sam
from sam_flax.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Ten images of 20 x 12 pixels, whose first pixel is their number, and a file that is none."""
    for number in range(10):
        pixels = PIXELS.copy()
        pixels[0, 0] = number
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def write_coco(folder, boxes, **more):
    """A COCO file of the folder's images, each with these boxes; images 0 has none."""
    images = [{"id": n, "file_name": f"{n}.png", "width": 20, "height": 12} for n in range(10)]
    marks = [{"id": 1, "image_id": n, "bbox": box, **more} for n in range(1, 10) for box in boxes]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": marks}))
    return path


@pytest.mark.parametrize(
    "form",
    [
        lambda path: [PIXELS],
        lambda path: PIXELS,
        lambda path: PIXELS[None],
        lambda path: Image.fromarray(PIXELS),
        lambda path: [Image.fromarray(PIXELS)],
        lambda path: path,
        lambda path: str(path),
        lambda path: [path],
        lambda path: (p for p in [path]),
        lambda path: path.parent,
        lambda path: ImageFolder(path.parent),
    ],
)
def test_every_form_gives_the_same_pixels(form, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS).save(path)
    (item,) = items_of(form(path))
    np.testing.assert_array_equal(item, PIXELS)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1", "LA"])
def test_pictures_and_files_of_any_kind_become_rgb_alike(mode, tmp_path):
    if mode == "I;16":
        picture = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(PIXELS).convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    picture.save(path)
    of_picture, of_file = items_of([picture, path])
    assert of_picture.shape == (12, 20, 3) and of_picture.dtype == np.uint8
    np.testing.assert_array_equal(of_picture, of_file)


def test_a_rotated_photograph_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "image.png", exif=exif)
    (item,) = items_of(tmp_path / "image.png")
    np.testing.assert_array_equal(item, np.rot90(PIXELS, -1))


def test_a_folder_is_sampled_evenly(folder):
    assert [item[0, 0, 0] for item in items_of(ImageFolder(folder, limit=4))] == [0, 2, 5, 7]
    assert len(list(items_of(folder))) == 10


def test_a_coco_file_gives_boxes_of_the_images_that_have_any(folder):
    path = write_coco(folder, [[2, 3, 10, 5], [15, 3, 10, 5], [1, 1, 0, 4]])
    items = list(items_of(ImageFolder(folder, path, limit=3)))
    assert [pixels[0, 0, 0] for pixels, _ in items] == [1, 4, 7]
    for _, boxes in items:
        np.testing.assert_array_equal(boxes, [[2, 3, 12, 8], [15, 3, 20, 8]])


@pytest.mark.parametrize(
    ("boxes", "more", "part"),
    [
        ([[0.1, 0.1, 0.5, 0.5]], {}, "between 0 and 1"),
        ([[8, 6, 15, 11]], {}, "corners"),
        ([[1, 2, 3]], {}, "four finite numbers"),
        ([[2, 3, 10, 5]], {"iscrowd": 1}, "no box that can prompt"),
    ],
)
def test_boxes_that_are_not_cocos_are_refused(folder, boxes, more, part):
    with pytest.raises(InputError, match=part):
        list(items_of(ImageFolder(folder, write_coco(folder, boxes, **more))))


def test_a_file_of_another_size_than_annotated_is_refused(folder):
    path = write_coco(folder, [[2, 3, 10, 5]])
    Image.fromarray(PIXELS[:6]).save(folder / "1.png")
    with pytest.raises(InputError, match="instances.json says 20x12"):
        list(items_of(ImageFolder(folder, path)))


def test_quantize_takes_a_folder_and_widths_by_name(folder, sam_tiny):
    config, params = sam_tiny
    options = {"sam": Sam(config), "progress": False}
    one = ahcptq_jax.quantize(params, ImageFolder(folder, limit=2), "W4A4", **options)
    arrays = [np.asarray(Image.open(folder / name)) for name in ("0.png", "5.png")]
    other = ahcptq_jax.quantize(params, iter(arrays), QuantConfig(w_bits=4, a_bits=4), **options)
    assert one.config == other.config
    for path, weight in one.weights.items():
        np.testing.assert_array_equal(weight.packed, other.weights[path].packed)
    assert str(one.activations) == str(other.activations)
