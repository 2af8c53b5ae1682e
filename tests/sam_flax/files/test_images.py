"""Every kind of picture becomes RGB by the one rule that `sam_flax.files.images` states."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam_flax.errors import InputError
from sam_flax.files.images import image_to_rgb, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]


def rotated_by_viewers() -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = 6  # shown turned by 90 degrees clockwise
    return exif


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tiff", "webp", "gif"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    picture = Image.fromarray(PIXELS)
    if suffix == "gif":
        picture = picture.quantize(256)
    picture.save(path, **({"lossless": True} if suffix == "webp" else {}))
    found = read_image(path)
    assert found.dtype == np.uint8 and found.shape == (6, 8, 3)
    np.testing.assert_array_equal(found, np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I;16B"])
def test_modes_become_rgb(mode: str) -> None:
    if mode.startswith("I;16"):
        image = Image.fromarray(GREY.astype(">u2" if mode.endswith("B") else "<u2") * 257)
        expected = np.repeat(GREY[..., None], 3, -1)
    elif mode == "RGBA":
        # Transparent where the colours still stand.
        image = Image.fromarray(np.concatenate([PIXELS, np.zeros((6, 8, 1), np.uint8)], -1))
        expected = PIXELS
    else:
        image = Image.fromarray(PIXELS).convert("L" if mode == "LA" else "RGB").convert(mode)
        expected = np.asarray(image.convert("RGB"))
    found = image_to_rgb(image)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
@pytest.mark.parametrize("bits", [8, 16])
def test_exif_rotation_is_applied(tmp_path: Path, suffix: str, bits: int) -> None:
    if bits == 16 and suffix in ("jpg", "webp"):
        pytest.skip("the format has 8 bits")
    path = tmp_path / f"a.{suffix}"
    picture = Image.fromarray(PIXELS if bits == 8 else GREY.astype(np.uint16) * 257)
    picture.save(path, exif=rotated_by_viewers(), **({"lossless": True} if suffix == "webp" else {}))
    stored = np.repeat(GREY[..., None], 3, -1) if bits == 16 else PIXELS
    if suffix == "jpg":
        with Image.open(path) as image:
            stored = np.asarray(image)
    np.testing.assert_array_equal(read_image(path), np.rot90(stored, -1))
    np.testing.assert_array_equal(read_image(path, (8, 6)), np.rot90(stored, -1))
    if suffix == "tiff":
        return  # which Pillow turns itself when it decodes it
    # A file of annotations that says the stored size means the stored picture.
    np.testing.assert_array_equal(read_image(path, (6, 8)), stored)


def test_what_cannot_be_read_gets_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(PIXELS).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "float.tiff")
    cases = {
        "none.png": "does not exist",
        "text.png": "not an image",
        "cut.png": "cannot be decoded",
        "float.tiff": "32 bits",
        ".": "cannot be opened",
    }
    for name, part in cases.items():
        with pytest.raises((InputError, FileNotFoundError), match=part) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    with pytest.raises(InputError, match="is 8x6 pixels but its caller says 9x6"):
        read_image(tmp_path / "whole.png", (6, 9))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Tag data", "ignore:Metadata", "ignore:Truncated")
def test_damage_anywhere_is_an_input_error(tmp_path: Path) -> None:
    """Whatever a decoder raises for damaged content speaks to the user."""
    rng = np.random.default_rng(1)
    for suffix in ("png", "jpg", "bmp", "tiff", "webp", "gif", "ppm"):
        path = tmp_path / f"a.{suffix}"
        exif = {} if suffix in ("bmp", "gif", "ppm") else {"exif": rotated_by_viewers()}
        Image.fromarray(PIXELS).save(path, **exif)
        whole = bytearray(path.read_bytes())
        for _ in range(40):
            damaged = bytearray(whole)
            for place in rng.integers(0, len(whole), 3):
                damaged[place] = rng.integers(0, 256)
            path.write_bytes(damaged[: rng.integers(1, len(whole) + 1)])
            try:
                assert read_image(path).dtype == np.uint8
            except InputError:
                pass
