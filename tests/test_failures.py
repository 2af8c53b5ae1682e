"""Every mistake of a user's gets one sentence that names it, and leaves nothing half-written.

One table for each door: Python's functions, the command line, and the files that it is given. Nothing here runs a
model: what is wrong is found before. `pytest tests/test_failures.py -rP` prints the sentences.
"""

import copy
import functools
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image
from safetensors.numpy import save_file

import ahcptq_jax
from ahcptq_jax import ImageFolder, QuantConfig, ReconstructionConfig, Rule
from ahcptq_jax.command import finish, parse_flags
from ahcptq_jax.flags import define_flags, values
from experiments import sweep
from experiments.job.options import Options
from experiments.job.run import dry_run
from hwcost.study.options import Options as HwcostOptions
from sam_flax import VIT_B, Sam, SamConfig, SamModel, SamPredictor, load_params, load_sam, save_params
from sam_flax.errors import InputError
from sam_flax.files.images import read_image
from sam_flax.sam import Params

DATA = Path(__file__).parent / "data"
CASES = Path(__file__).parents[2] / "shared" / "cases"
TINY = DATA / "sam_tiny_s0.pth"
IMAGE = np.zeros((40, 60, 3), np.uint8)


def check_sentence(sentence: str, part: str) -> None:
    """One sentence: it names the input, ends as one, and is no dump of a structure."""
    assert part in sentence, sentence
    assert "\n" not in sentence.strip() and "Traceback" not in sentence, sentence
    assert 25 < len(sentence) < 700, sentence
    print(sentence)


# ------------------------------------------------------------------------------------------------------------ Python


@pytest.fixture(scope="module")
def tiny(sam_tiny: tuple[SamConfig, Params]) -> tuple[Sam, Params]:
    config, params = sam_tiny
    return Sam(config), params


@pytest.fixture(scope="module")
def predictor(tiny: tuple[Sam, Params]) -> SamPredictor:
    """One that holds an image of 40 x 60 pixels, which no model has embedded."""
    made = SamPredictor(SamModel(*tiny))
    config = tiny[0].config
    made.original_size, made.input_size = (40, 60), (config.img_size * 2 // 3, config.img_size)
    made.features = jax.numpy.zeros((1, config.grid, config.grid, config.out_chans))
    return made


def quantize(tiny: tuple[Sam, Params], **changes: Any) -> None:
    given: dict[str, Any] = {"params": tiny[1], "calib": [IMAGE], "sam": tiny[0], "progress": False}
    ahcptq_jax.quantize(**(given | changes))


CALLS: dict[str, tuple[Callable[..., Any], str]] = {
    "w_bits too wide": (lambda: QuantConfig(w_bits=9), "w_bits=9 must be a width from 2 to 8"),
    "a_bits too narrow": (lambda: QuantConfig(a_bits=1), "a_bits=1"),
    "bits as text": (lambda: QuantConfig(w_bits="4"), "w_bits='4' must be a whole number"),  # type: ignore[arg-type]
    "bits as truth": (lambda: QuantConfig(w_bits=True), "w_bits=True must be a whole number"),
    "negative groups": (lambda: QuantConfig(groups=-1), "groups=-1"),
    "unknown range": (lambda: QuantConfig(act_range="all"), "choose one of minmax"),
    "switch as number": (lambda: QuantConfig(hluq=1), "hluq=1 must be True or False"),  # type: ignore[arg-type]
    "negative seed": (lambda: QuantConfig(seed=-1), "seed=-1"),
    "negative iterations": (lambda: ReconstructionConfig(iterations=-1), "iterations=-1"),
    "unknown part": (lambda: ReconstructionConfig(parts=("x",)), "parts has 'x'"),
    "rate not finite": (lambda: ReconstructionConfig(scale_rate=float("nan")), "scale_rate=nan"),
    "rule that is no pattern": (lambda: Rule("("), "("),
    "config as text": (lambda tiny: quantize(tiny, config="x"), "config='x' names no widths"),
    "config of 9 bits": (lambda tiny: quantize(tiny, config="w9a4"), "config='w9a4' names no widths"),
    "config of nothing": (lambda tiny: quantize(tiny, config=None), "config must be"),
    "parameters of nothing": (lambda tiny: quantize(tiny, params=None), "params must be the nested parameters"),
    "parameters of another kind": (lambda tiny: quantize(tiny, params={"a": 1}), "params must be"),
    "module of another model": (lambda tiny: quantize(tiny, sam=Sam(VIT_B)), "sam"),
    "module of nothing": (lambda tiny: quantize(tiny, sam=tiny[1]), "sam must be a module"),
    "no images": (lambda tiny: quantize(tiny, calib=[]), "no calibration images"),
    "images of a number": (lambda tiny: quantize(tiny, calib=3), "calib"),
    "images as a mapping": (lambda tiny: quantize(tiny, calib={"a": IMAGE}), "calib must be images"),
    "folder without images": (lambda tiny: quantize(tiny, calib=DATA), "holds no image files"),
    "path to no image": (lambda tiny: quantize(tiny, calib=DATA / "none.png"), "none.png"),
    "file that is no image": (lambda tiny: quantize(tiny, calib=[TINY]), "sam_tiny_s0.pth is not an image"),
    "32-bit picture": (lambda tiny: quantize(tiny, calib=Image.new("F", (9, 9))), "32 bits per pixel"),
    "absent folder": (lambda tiny: quantize(tiny, calib=ImageFolder("absent")), "The image folder absent"),
    "limit of nothing": (lambda tiny: quantize(tiny, calib=ImageFolder(DATA, limit=0)), "limit=0"),
    "annotations that are no JSON": (lambda tiny: quantize(tiny, calib=ImageFolder(DATA, TINY)), "as JSON"),
    "image of floats": (lambda tiny: quantize(tiny, calib=[IMAGE.astype(float)]), "alibration"),
    "image without pixels": (lambda tiny: quantize(tiny, calib=[IMAGE[:0]]), "alibration"),
    "box of text": (lambda tiny: quantize(tiny, calib=[(IMAGE, "x")]), "alibration item 0"),
    "box outside": (lambda tiny: quantize(tiny, calib=[(IMAGE, [[90, 90, 99, 99]])]), "alibration item 0"),
    "absent checkpoint": (lambda: load_sam("/none.pth"), "/none.pth does not exist"),
    "folder as checkpoint": (lambda: load_sam(DATA), "directory"),
    "absent parameters": (lambda: load_params("/none.safetensors"), "/none.safetensors does not exist"),
    "torch file as our own": (lambda: load_params(TINY), "use load_sam"),
    "absent quantized model": (lambda: ahcptq_jax.load("/none"), "/none does not exist"),
    "float model as quantized": (lambda: ahcptq_jax.load(TINY), "Quantized.save"),
    "save into nothing": (lambda tiny: save_params("/none/a", tiny[0].config, tiny[1]), "/none/a"),
    "save as a type": (lambda tiny: save_params("/tmp/a", tiny[0].config, tiny[1], "int8"), "int8"),
    "absent image": (lambda: read_image("/none.png"), "/none.png does not exist"),
    "set an image of floats": (lambda predictor: copy.copy(predictor).set_image(IMAGE.astype(float)), "uint8"),
    "set a grey image": (lambda predictor: copy.copy(predictor).set_image(IMAGE[..., 0]), "(40, 60)"),
    "set an unknown format": (lambda predictor: copy.copy(predictor).set_image(IMAGE, "HSV"), "'RGB' or 'BGR'"),
    "predict nothing": (lambda predictor: predictor.predict(), "No prompt was given"),
    "predict a box of three": (lambda predictor: predictor.predict(box=np.zeros(3)), "box has shape (3,)"),
    "predict a box of NaN": (lambda predictor: predictor.predict(box=np.full(4, np.nan)), "NaN"),
    "predict a huge box": (lambda predictor: predictor.predict(box=np.array([0, 0, 1e300, 1e300])), "1e+300"),
    "predict a box outside": (lambda predictor: predictor.predict(box=np.array([70, 50, 90, 60])), "outside the image"),
    "predict an empty box": (lambda predictor: predictor.predict(box=np.array([9, 9, 2, 2])), "x1 <= x0"),
    "predict a text": (lambda predictor: predictor.predict(box="box"), "not an array of numbers"),
    "predict points without labels": (lambda predictor: predictor.predict(np.ones((1, 2))), "point_labels is missing"),
    "predict unknown labels": (
        lambda predictor: predictor.predict(np.ones((1, 2)), np.array([7])),
        "point_labels must",
    ),
    "predict a small mask": (
        lambda predictor: predictor.predict(mask_input=np.zeros((1, 3, 3))),
        "mask_input has shape",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str, request: pytest.FixtureRequest) -> None:
    call, part = CALLS[name]
    wanted = call.__code__.co_varnames[: call.__code__.co_argcount]
    arguments = {fixture: request.getfixturevalue(fixture) for fixture in wanted}
    with pytest.raises((InputError, OSError)) as caught:
        call(**arguments)
    check_sentence(str(caught.value), part)


# ------------------------------------------------------------------------------------------------------ command line


def command(*arguments: str) -> int:
    """What `python -m experiments.main --dry_run` does with the arguments; its status."""
    found = flags.FlagValues()
    define_flags(Options, flag_values=found)

    def work() -> int:
        print(dry_run(Options(**values(Options, found)), verbosity=-1))
        return 0

    try:
        left = parse_flags(["main", *arguments], found)
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return finish(left, work)


LINES: dict[str, tuple[list[str], str]] = {
    "unknown flag": (["--bits=4"], "bits"),
    "unknown method": (["--method=magic"], "magic"),
    "width of a word": (["--w_bits=four"], "w_bits"),
    "something besides flags": (["--w_bits=4", "66"], "'66'"),
    "weights too wide": (["--w_bits=9"], "--w_bits=9"),
    "activations too narrow": (["--a_bits=1"], "--a_bits=1"),
    "negative groups": (["--groups=-1"], "--groups=-1"),
    "unknown metric": (["--group_metric=x"], "group_metric"),
    "negative iterations": (["--iterations=-1"], "--iterations=-1"),
    "rate below zero": (["--iterations=5", "--scale_rate=-1"], "--scale_rate=-1"),
    "too hard": (["--harder=5"], "--harder=5"),
    "no calibration": (["--num_calib=0"], "--num_calib=0"),
    "no scenes": (["--num_scenes=0"], "--num_scenes=0"),
    "negative limit": (["--limit=-1"], "--limit=-1"),
    "negative seed": (["--seed=-1"], "--seed=-1"),
    "huge seed": (["--seed=99999999999"], "--seed=99999999999"),
    "unknown scenes": (["--scenes=test"], "scenes"),
    "unknown precision": (["--precision=int3"], "precision"),
    "unknown masks": (["--multimask=all"], "multimask"),
    "unknown score": (["--score=luck"], "score"),
    "unknown prompt": (["--prompt=text"], "prompt"),
    "no heads": (["--decoder_num_heads=0"], "--decoder_num_heads=0"),
    "two colours": (["--pixel_mean=1,2"], "--pixel_mean='1,2' must be three numbers"),
    "blocks of words": (["--global_attn_indexes=a"], "--global_attn_indexes"),
    "images alone": (["--images=a"], "--images and --annotations belong together"),
    "annotations alone": (["--calib_annotations=a"], "--calib_images and --calib_annotations belong together"),
    "detector without images": (["--boxes=a.json"], "--images"),
    "empty checkpoint": (["--checkpoint="], "--checkpoint is empty"),
    "artefact of no quantization": (["--artefact=a", "--method=fp"], "--artefact"),
    "absent flag file": (["--flagfile=/none.flags"], "/none.flags"),
    "unwritable folder": (["--out=/proc/none/out"], "--out=/proc/none/out"),
}


@pytest.mark.parametrize("name", LINES)
def test_command_lines(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, part = LINES[name]
    assert command(f"--out={tmp_path / 'out'}", *arguments) == 2
    check_told(capsys, part)
    assert not list(tmp_path.iterdir())


def check_told(capsys: pytest.CaptureFixture[str], part: str) -> None:
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("Error: ") and told.err.count("\n") == 1
    check_sentence(told.err, part)


SETTINGS: dict[str, tuple[Callable[[], Any], str]] = {
    "sweep of an unknown method": (lambda: sweep.parse_settings("magic", "44"), "--methods has 'magic'"),
    "sweep of an unknown switch": (lambda: sweep.parse_settings("ahcptq-gelu", "44"), "'-gelu'"),
    "sweep of a value that is none": (lambda: sweep.parse_settings("ahcptq+groups=many", "44"), "groups is a number"),
    "sweep of one width": (lambda: sweep.parse_settings("ahcptq", "4"), "--bits has '4'"),
    "hwcost of an unknown model": (lambda: HwcostOptions(model="vit_x"), "vit_x"),
    "hwcost of an unknown board": (lambda: HwcostOptions(device="abacus"), "abacus"),
    "hwcost of no prompts": (lambda: HwcostOptions(prompts=0), "prompts=0"),
    "hwcost of an odd constant": (lambda: HwcostOptions(constant=("clock",)), "--constant"),
    "hwcost of an artefact without images": (lambda: HwcostOptions(artefact="a"), "--images"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_other_commands(name: str) -> None:
    call, part = SETTINGS[name]
    with pytest.raises(InputError) as caught:
        call()
    check_sentence(str(caught.value), part)


# ------------------------------------------------------------------------------------------------------------- files


def document(**changes: Any) -> dict[str, Any]:
    """A COCO document of one object on one image; changes are to the object, or to the image's file name."""
    image = {"id": 1, "file_name": changes.pop("file_name", "a.png"), "height": 60, "width": 80}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 400, "bbox": [10, 10, 20, 20]}
    annotation |= {"segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]], **changes}
    return {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "thing"}]}


DETECTION = {"image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], "score": 0.5}
JSON: dict[str, Any] = {
    "good": document(),
    "empty": document() | {"annotations": []},
    "outside": document(bbox=[200, 10, 20, 20]),
    "text_box": document(bbox="10 10 20 20"),
    "negative_box": document(bbox=[10, 10, -20, 20]),
    "corners": document(bbox=[10, 10, 30, 30]),
    "shares": document(bbox=[0.125, 0.17, 0.25, 0.33]),
    "crowd": document(iscrowd=1),
    "maskless": document(segmentation=[]),
    "other_image": document(image_id=9),
    "other_category": document(category_id=9),
    "absent": document(file_name="b.png"),
    "short": document(file_name="short.png"),
    "text": document(file_name="text.png"),
    "small": document(file_name="small.png"),
    "list": [1, 2],
    "detections_dict": {"boxes": [DETECTION]},
    "detections_other": [DETECTION | {"image_id": 77}],
    "detections_score": [DETECTION | {"score": 3}],
    "detections_shares": [DETECTION | {"bbox": [0.1, 0.1, 0.3, 0.3]}],
    "detections_corners": [DETECTION | {"bbox": [40, 40, 75, 55]}],
    "detections_category": [DETECTION | {"category_id": 5}],
    "detections_empty": [],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO folder of one good image, and broken files of all kinds beside it."""
    path = tmp_path_factory.mktemp("files")
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path / "a.png")
    Image.fromarray(pixels[:30]).save(path / "small.png")
    (path / "short.png").write_bytes((path / "a.png").read_bytes()[:700])
    (path / "text.png").write_text("no picture")
    for name, value in JSON.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    (path / "broken.json").write_text('{"images": [')
    (path / "binary.json").write_bytes(bytes(range(256)))
    (path / "detections_nan.json").write_text(json.dumps([DETECTION | {"bbox": [float("nan"), 5, 20, 20]}]))
    (path / "picture.pth").write_bytes((path / "a.png").read_bytes())
    (path / "truncated.pth").write_bytes(TINY.read_bytes()[:50_000])
    (path / "empty.safetensors").write_bytes(b"")
    (path / "header.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    save_file({"layer1.0.conv1.weight": np.zeros((4, 3, 3, 3), np.float32)}, path / "resnet.safetensors")
    save_file({"a": np.zeros(1, np.float32)}, path / "quantized.safetensors", {"format": "ahcptq_jax"})
    save_params(path / "float.safetensors", *_float())
    (path / "utf16.flags").write_bytes("--method=magic\n".encode("utf-16"))
    (path / "itself.flags").write_text(f"--flagfile={path / 'itself.flags'}\n")

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(path / "executed"),)

    with zipfile.ZipFile(path / "evil.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": Evil()}))
    return path


@functools.cache
def _float() -> tuple[SamConfig, Params]:
    sam, params = load_sam(TINY, decoder_num_heads=4)
    return sam.config, params


def coco(name: str, **more: str) -> list[str]:
    return ["--images={d}", f"--annotations={{d}}/{name}.json", *(f"--{k}={{d}}/{v}.json" for k, v in more.items())]


def calibration(name: str) -> list[str]:
    return ["--calib_images={d}", f"--calib_annotations={{d}}/{name}.json"]


# Arguments, with {d} for the folder above, and a part of the sentence.
FILES: dict[str, tuple[list[str], str]] = {
    "absent checkpoint": (["--checkpoint={d}/none.pth"], "none.pth does not exist"),
    "picture as checkpoint": (["--checkpoint={d}/picture.pth"], "neither"),
    "truncated checkpoint": (["--checkpoint={d}/truncated.pth"], "truncated"),
    "harmful checkpoint": (["--checkpoint={d}/evil.pth"], "evil.pth"),
    "empty checkpoint": (["--checkpoint={d}/empty.safetensors"], "empty"),
    "checkpoint of a huge header": (["--checkpoint={d}/header.safetensors"], "header.safetensors"),
    "checkpoint of another model": (["--checkpoint={d}/resnet.safetensors"], "not a SAM"),
    "folder as checkpoint": (["--checkpoint={d}"], "directory"),
    "quantized model as checkpoint": (["--checkpoint={d}/quantized.safetensors"], "--artefact"),
    "heads that do not divide": ([f"--checkpoint={TINY}", "--decoder_num_heads=7"], "heads"),
    "absent artefact": (["--artefact={d}/none.safetensors"], "does not exist"),
    "float model as artefact": (["--artefact={d}/float.safetensors"], "--checkpoint"),
    "another model as artefact": (["--artefact={d}/resnet.safetensors"], "Quantized.save"),
    "picture as artefact": (["--artefact={d}/a.png"], "Quantized.save"),
    "absent image folder": (["--images={d}/none", "--annotations={d}/good.json"], "does not exist"),
    "file as image folder": (["--images={d}/a.png", "--annotations={d}/good.json"], "is a file"),
    "absent annotations": (coco("none"), "none.json"),
    "broken annotations": (coco("broken"), "JSON"),
    "binary annotations": (coco("binary"), "JSON"),
    "list as annotations": (coco("list"), "not a COCO instances file"),
    "no annotations": (coco("empty"), "no annotations"),
    "box outside": (coco("outside"), "outside"),
    "box of text": (coco("text_box"), "four finite numbers"),
    "box of negative size": (coco("negative_box"), "negative size"),
    "boxes as corners": (coco("corners"), "corners"),
    "boxes as shares": (coco("shares"), "shares of the image"),
    "crowds alone": (coco("crowd"), "CVAT"),
    "no masks": (coco("maskless"), "no valid mask"),
    "unknown image": (coco("other_image"), "belongs to image 9"),
    "unknown category": (coco("other_category"), "category 9"),
    "absent image": (coco("absent"), "b.png"),
    "truncated image": (coco("short"), "short.png"),
    "text as image": (coco("text"), "text.png"),
    "image of another size": (coco("small"), "80x30"),
    "too few images to calibrate": (calibration("good"), "--num_calib=32"),
    "calibration on corners": (calibration("corners"), "corners"),
    "absent calibration image": (calibration("absent"), "b.png"),
    "absent detections": (coco("good", boxes="none"), "none.json"),
    "object as detections": (coco("good", boxes="detections_dict"), "results file"),
    "detections of NaN": (coco("good", boxes="detections_nan"), "finite"),
    "detections of other images": (coco("good", boxes="detections_other"), "No box is left"),
    "detections of no score": (coco("good", boxes="detections_score"), "score 3"),
    "detections as shares": (coco("good", boxes="detections_shares"), "between 0 and 1"),
    "detections as corners": (coco("good", boxes="detections_corners"), "corners"),
    "detections of other categories": (coco("good", boxes="detections_category"), "category 5"),
    "no detections": (coco("good", boxes="detections_empty"), "No box is left"),
    "flag file of UTF-16": (["--flagfile={d}/utf16.flags"], "magic"),
    "flag file that names itself": (["--flagfile={d}/itself.flags"], "names itself"),
    "picture as flag file": (["--flagfile={d}/a.png"], "a.png"),
    "folder in the place of a file": (["--out={d}/a.png/out"], "--out"),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, part = FILES[name]
    before = sorted(path.name for path in folder.iterdir())
    given = [argument.format(d=folder) for argument in arguments]
    assert command(f"--out={tmp_path / 'out'}", "--num_scenes=1", *given) == 2
    check_told(capsys, part)
    assert not list(tmp_path.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == before, "nothing in a file runs, nothing is written"


def test_there_are_many() -> None:
    assert len(CALLS) + len(LINES) + len(SETTINGS) + len(FILES) >= 130


def test_what_the_good_files_give(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the mistakes all of them pass: what was refused above was refused for the mistake."""
    given = [a.format(d=folder) for a in (*coco("good"), *calibration("good"), "--num_calib=1")]
    assert command(f"--out={tmp_path / 'out'}", f"--checkpoint={folder / 'float.safetensors'}", *given) == 0
    assert "1 images with 1 boxes" in capsys.readouterr().out


@pytest.mark.skipif(not CASES.is_dir(), reason=f"the files of real reports are not at {CASES}")
@pytest.mark.parametrize(("name", "part"), [("bbox_xyxy", "corners"), ("bbox_normalised", "shares of the image")])
def test_files_of_real_reports(name: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(1, 5):
        Image.fromarray(np.zeros((80, 100, 3), np.uint8)).save(tmp_path / f"{i}.png")
    out = tmp_path / "out"
    assert command(f"--out={out}", f"--images={tmp_path}", f"--annotations={CASES / name}.json", "--method=fp") == 2
    check_told(capsys, part)
    assert not out.exists()
