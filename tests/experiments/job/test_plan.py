"""What a run works on: disjoint scenes whatever the seed, flags for what a checkpoint does not say, any file name."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.job import plan
from experiments.job import run as one_run
from experiments.job.options import Options
from experiments.scenes.scenes import CALIB_SEED, scene_dataset
from sam_flax import CONFIGS, load_sam, save_params
from sam_flax.errors import InputError

DATA = Path(__file__).parents[2] / "data"
TINY = str(DATA / "sam_tiny_s0.pth")


@pytest.mark.parametrize("first", [plan.HELD_BACK_START - 2, plan.HELD_BACK_START, plan.HELD_BACK_START + 3])
def test_no_seed_calibrates_on_held_back_scenes(first: int) -> None:
    held_back = {scene.image.tobytes() for scene in scene_dataset(CALIB_SEED, 8, 64, start=plan.HELD_BACK_START)}
    found = [scene.image.tobytes() for scene in plan._calibration_scenes(first, 4, 64)]
    assert len(set(found)) == 4 and not held_back & set(found)
    # The scenes that follow are those that come next, whichever run takes them.
    after = [scene.image.tobytes() for scene in plan._calibration_scenes(first + 2, 4, 64)]
    assert found[2:] == after[:2]


def test_the_seed_of_the_report_calibrates_on_other_scenes() -> None:
    options = Options(scenes="train", seed=31250, num_scenes=4, num_calib=32)
    config = CONFIGS["mini"]
    dataset = plan.evaluation_set(options, config)
    evaluated = {item.array.tobytes() for item in dataset.items if item.array is not None}
    assert not evaluated & {image.tobytes() for image, _ in plan.calibration_set(options, config)}


def test_scenes_of_usual_seeds_are_as_they_were() -> None:
    found = [image for image, _ in plan.calibration_set(Options(seed=2, num_calib=3), CONFIGS["mini"])]
    expected = [scene.image for scene in scene_dataset(CALIB_SEED, 3, CONFIGS["mini"].img_size, start=6)]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_a_checkpoint_does_not_say_is_given_by_flags(tmp_path: Path) -> None:
    options = Options(
        checkpoint=TINY, decoder_num_heads=2, pixel_mean="1,2,3.5", pixel_std="4,5,6", method="minmax", num_calib=1
    )
    sam, _ = plan.load_model(options)
    assert (sam.config.decoder_num_heads, sam.config.pixel_mean, sam.config.pixel_std) == (2, (1, 2, 3.5), (4, 5, 6))
    small, _ = plan.load_model(Options(checkpoint=TINY, decoder_num_heads=4, img_size=2 * sam.config.img_size))
    assert small.config.img_size == 2 * sam.config.img_size
    for wrong in (
        {"global_attn_indexes": "1,x"},
        {"img_size": 0},
        {"pixel_mean": "1,2"},
        {"pixel_std": "a,b,c"},
        {"pixel_mean": "nan,1,1"},
        {"decoder_num_heads": 0},
    ):
        with pytest.raises(InputError, match=f"--{next(iter(wrong))}="):
            Options(**wrong)


def test_warnings_are_kept_with_the_results(tmp_path: Path) -> None:
    options = Options(checkpoint=TINY, method="fp", num_scenes=1, blank=False, out=str(tmp_path))
    with pytest.warns(UserWarning, match="heads"):
        found = one_run.run(options, verbosity=-1)
    (sentence,) = found["warnings"]
    assert "how many heads its mask decoder has" in sentence and "--decoder_num_heads" in sentence
    assert json.loads((tmp_path / "results.json").read_text())["warnings"] == [sentence]
    assert "how many heads its mask decoder has" in (tmp_path / "report.html").read_text()
    given = one_run.run(Options(**options.given() | {"decoder_num_heads": 4}), verbosity=-1)
    assert given["warnings"] == []


def test_files_of_the_other_kind_name_their_flag(tmp_path: Path) -> None:
    sam, params = load_sam(TINY, decoder_num_heads=4)
    save_params(tmp_path / "float.safetensors", sam.config, params)
    with pytest.raises(InputError, match="give it with --checkpoint"):
        plan.read_inputs(Options(checkpoint=TINY, artefact=str(tmp_path / "float.safetensors"), decoder_num_heads=4))
    header = json.dumps({"__metadata__": {"format": "ahcptq_jax"}}).encode()
    (tmp_path / "quantized.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="is a quantized model; .*--artefact"):
        plan.load_model(Options(checkpoint=str(tmp_path / "quantized.safetensors")))


def test_names_that_are_not_utf8_end_in_results(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    weights, picture = folder / os.fsdecode(b"w\xe9.pth"), os.fsdecode(b"\xe9.png")
    shutil.copy(TINY, weights)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(folder / picture)
    box = {"bbox": [10, 10, 20, 20], "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]]}
    document = {
        "images": [{"id": 1, "file_name": picture, "height": 60, "width": 80}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 400, **box}],
        "categories": [{"id": 1, "name": "a"}],
    }
    (folder / "a.json").write_text(json.dumps(document))
    out = tmp_path / os.fsdecode(b"out\xe9")
    data = {"images": str(folder), "annotations": str(folder / "a.json")}
    options = Options(checkpoint=str(weights), decoder_num_heads=4, method="fp", blank=False, out=str(out), **data)
    one_run.run(options, verbosity=-1)
    found = json.loads((out / "results.json").read_text())
    assert found["config"]["out"] == str(out) and found["model"] == "w\\xe9.pth"
    assert b"--out=" + os.fsencode(out) + b"\n" in (out / "flags.txt").read_bytes()
    assert "fp" in found and (out / "report.html").stat().st_size > 1000
