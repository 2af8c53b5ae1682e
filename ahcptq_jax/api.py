"""`quantize`: from a floating-point segmenter and a few images to a `Quantized` one, with or without reconstruction."""

import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ahcptq_jax.architectures import architecture_of, known_architectures, module_of
from ahcptq_jax.architectures.sites import flatten, unflatten
from ahcptq_jax.calibration import saved_state
from ahcptq_jax.calibration.cache import StatisticsCache
from ahcptq_jax.calibration.calibrate import Calibrated, calibrate
from ahcptq_jax.calibration.images import CalibrationImage, prepare_images
from ahcptq_jax.config import W4A4, QuantConfig
from ahcptq_jax.formats import artefact
from ahcptq_jax.mixed import choose_widths, parse_budget
from ahcptq_jax.reconstruction.config import ReconstructionConfig
from ahcptq_jax.reconstruction.run import UnitReport, reconstruct
from ahcptq_jax.reconstruction.together import mesh_of
from ahcptq_jax.rules import Rule
from ahcptq_jax.runtime.quantized import Quantized
from sam_flax.errors import InputError
from sam_flax.sam import Params


def quantize(
    params: Params,
    calib: Any,
    config: QuantConfig | str = W4A4,
    *,
    sam: Any = None,
    reconstruction: ReconstructionConfig | None = None,
    state_dir: str | Path | None = None,
    cache: StatisticsCache | None = None,
    remainder: Literal["fp16", "fp32"] = "fp16",
    progress: bool = True,
    on_unit: Callable[[UnitReport], None] | None = None,
) -> Quantized:
    """Quantizes a segmenter, calibrated on a few images, and learns its rounding and scales if asked.

    Args:
        params: its parameters, as `sam_flax.load_sam` returns them.
        calib: images, 32 of them usually: a list, generator or other iterable of (H, W, 3) uint8 arrays, Pillow
            images or paths of files, each alone or as (image, boxes) with boxes (N, 4) as x0, y0, x1, y1 in pixels of
            that image; or the path of a folder; or an `ImageFolder`, with the boxes of a COCO file if there is one. An
            image alone is prompted with the box that covers it. `sam_flax.files.images` says how gray, palette, CMYK,
            16-bit, transparent and rotated pictures become RGB.
        config: bits, rules and switches; or "w4a4" and the like for these bits with every part of the method, the
            digits being the widths of weights and activations.
        sam: the module. By default it is that of the configuration which the parameters of `load_sam` carry.
        reconstruction: how to learn rounding and scales, for example `ReconstructionConfig(iterations=200)`; None
            leaves the calibration as it is.
        state_dir: where the state is kept; a later run with the same arguments goes on there and ends with the same
            result.
        cache: passes over the images and quantized weights of earlier runs, to which those of this run are added; the
            result is the same without it.
        remainder: "fp16" rounds the parameters that stay in floating point to float16 at the end, "fp32" leaves them
            as they are. A saved file holds them as they are returned.
        progress: shows bars on stderr.
        on_unit: called after each unit of the reconstruction.

    Returns:
        The quantized model, which `sam_flax.SamPredictor` takes as it is.

    Raises:
        FileNotFoundError: if a path in `calib` leads nowhere.
        InputError: if the parameters are no known model's, or not finite, or do not fit `sam`; if a calibration image
            or box is unusable; or if a configuration is none.
        ValueError: if a file in `state_dir` is damaged or another run's.
    """
    config = _configuration(config)
    _check_reconstruction(reconstruction)
    if reconstruction is not None:
        mesh_of(reconstruction.batch)
    if config.budget:
        parse_budget(config.budget)
    if remainder not in ("fp16", "fp32"):
        raise InputError(f"remainder={remainder!r} must be 'fp16' or 'fp32'.")
    sam = check_model(sam, params)
    images = prepare_images(calib, sam, config)
    folder = None if state_dir is None else Path(state_dir)
    if config.budget:
        config = dataclasses.replace(
            config, rules=config.rules + _widths(sam, params, images, config, folder, progress)
        )
    if reconstruction is None:
        calibrated = calibrate(sam, params, images, config, progress=progress, state_dir=folder, cache=cache)
        return calibrated.quantized.with_rounded_remainder() if remainder == "fp16" else calibrated.quantized
    # Channels stay on their own and quantizers off the grid in the calibration; they are grouped, and put on it, while
    # they are learned. Its searches see the grid: AGQ's scale is learned, its levels an octave are not.
    start = dataclasses.replace(config, groups=0)
    calibrated = _calibrated(sam, params, images, start, folder, progress, cache)
    finished = reconstruct(
        sam,
        calibrated.params,
        calibrated.quantized,
        [image.canvas for image in images],
        [image.boxes for image in images],
        reconstruction,
        target=config,
        original=None if calibrated.original is calibrated.params else calibrated.original,
        progress=progress,
        state_dir=folder,
        on_unit=on_unit,
    )
    return finished.with_rounded_remainder() if remainder == "fp16" else finished


def quantize_model(sam: Any, params: Params, calib: Iterable[Any], config: QuantConfig, **options: Any) -> Quantized:
    """`quantize` with the module first; for programs written for an earlier version."""
    return quantize(params, calib, config, sam=sam, **options)


def quantize_reconstructed(
    sam: Any,
    params: Params,
    calib: Iterable[Any],
    config: QuantConfig,
    reconstruction: ReconstructionConfig,
    **options: Any,
) -> Quantized:
    """`quantize` with a reconstruction; for programs written for an earlier version."""
    return quantize(params, calib, config, sam=sam, reconstruction=reconstruction, **options)


def _configuration(config: Any) -> QuantConfig:
    """The configuration that `quantize` was given, or that a text such as "w4a4" names; InputError if it is neither."""
    if isinstance(config, str):
        widths = re.fullmatch(r"w([2-8])a([2-8])", config.strip().lower())
        if widths is None:
            raise InputError(
                f"config={config!r} names no widths; write 'w4a4', each from 2 to 8, or for a method by name give "
                "QuantConfig(**METHODS[name])."
            )
        return QuantConfig(w_bits=int(widths[1]), a_bits=int(widths[2]))
    if not isinstance(config, QuantConfig):
        raise InputError(
            f"config must be an ahcptq_jax.QuantConfig, such as W4A4, or a text such as 'w4a4', but is a "
            f"{type(config).__name__}; for a method by name give QuantConfig(**METHODS[name])."
        )
    return config


def _check_reconstruction(reconstruction: Any) -> None:
    """Raises InputError unless it is a configuration of reconstruction, or None."""
    if reconstruction is not None and not isinstance(reconstruction, ReconstructionConfig):
        raise InputError(
            "reconstruction must be an ahcptq_jax.ReconstructionConfig, or None for none, but is a "
            f"{type(reconstruction).__name__}."
        )


def check_model(sam: Any, params: Any) -> Any:
    """The module that the parameters belong to, which is `sam` if given.

    Raises:
        InputError: if the parameters are no model's, or another model's than `sam`, or do not say which.
    """
    if isinstance(sam, Mapping) or (sam is not None and not hasattr(sam, "config")):
        raise InputError(
            f"sam must be a module, such as the first result of sam_flax.load_sam, but is a {type(sam).__name__}."
        )
    candidates = known_architectures() if sam is None else (architecture_of(sam),)
    if not any(_has_parts(params, architecture.parts) for architecture in candidates):
        raise InputError(
            f"params must be the nested parameters of a SAM, with {', '.join(candidates[0].parts)}, but is a "
            f"{type(params).__name__} without them; pass the second result of sam_flax.load_sam."
        )
    carried = getattr(params, "config", None)
    if sam is None:
        if carried is None:
            raise InputError(
                "params do not say how many heads the decoder has, nor the pixel statistics, which no shape shows; "
                "pass sam=, the first result of sam_flax.load_sam."
            )
        sam = module_of(carried)
    elif carried not in (None, sam.config):
        # What shapes do not hold would be taken from the one or the other: two models were mixed.
        different = [name for name, value in vars(sam.config).items() if getattr(carried, name, None) != value]
        raise InputError(
            f"sam and params are not of one model: they say different {', '.join(different) or 'configurations'}; pass "
            "both results of one load_sam."
        )
    architecture_of(sam).check(sam, params)
    return sam


def _has_parts(params: Any, parts: tuple[str, ...]) -> bool:
    """Whether an object is a nested mapping with these parts at its top."""
    return isinstance(params, Mapping) and all(isinstance(params.get(part), Mapping) for part in parts)


def _identity(sam: Any, params: Params, images: list[CalibrationImage], config: QuantConfig) -> str:
    """What tells the state of this quantization from that of all others."""
    inputs = [(image.canvas, image.boxes) for image in images]
    return saved_state.fingerprint(saved_state.code_version(), sam.config, config, params, inputs)


_WIDTHS = "widths.npz"


def _widths(
    sam: Any,
    params: Params,
    images: list[CalibrationImage],
    config: QuantConfig,
    folder: Path | None,
    progress: bool,
) -> tuple[Rule, ...]:
    """The rules that meet the budget, which are read from the state folder if an equal run has left them there."""
    identity = ""
    if folder is not None:
        identity = _identity(sam, params, images, config)
        saved = saved_state.load_by_all(folder / _WIDTHS, identity)
        if saved is not None:
            return tuple(Rule(**rule) for rule in json.loads(saved["rules"].tobytes()))
    rules = choose_widths(sam, params, images, config, progress)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps([dataclasses.asdict(rule) for rule in rules])
        saved_state.save_for_all(folder / _WIDTHS, identity, {"rules": np.frombuffer(text.encode(), np.uint8)})
    return rules


# The whole calibration is saved, and not made again: the identities of saved units depend on its last bits, which can
# differ between processors.
_CALIBRATED = "calibrated.npz"


def _calibrated(
    sam: Any,
    params: Params,
    images: list[CalibrationImage],
    config: QuantConfig,
    folder: Path | None,
    progress: bool,
    cache: StatisticsCache | None,
) -> Calibrated:
    """The calibration, which is read from the state folder if a run with the same arguments has left it there."""
    if folder is None:
        return calibrate(sam, params, images, config, progress=progress, cache=cache, off_grid=True)
    identity = _identity(sam, params, images, config)
    found = _load_calibrated(folder, identity, params)
    if found is None:
        state = folder / "calibration"
        found = calibrate(sam, params, images, config, progress=progress, state_dir=state, cache=cache, off_grid=True)
        _save_calibrated(folder, identity, params, found)
    return found


def _save_calibrated(folder: Path, identity: str, params: Params, calibrated: Calibrated) -> None:
    """Saves a calibration: the quantized model, and those parameters that transforms have changed."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        file = Path(scratch) / "calibrated.safetensors"
        artefact.save(calibrated.quantized, file)
        content = np.frombuffer(file.read_bytes(), np.uint8)
    kept = {f"params/{path}": value for path, value in _changed(params, calibrated.params).items()}
    kept |= {f"original/{path}": value for path, value in _changed(calibrated.params, calibrated.original).items()}
    saved_state.save_for_all(folder / _CALIBRATED, identity, {"artefact": content, **kept})


def _changed(before: Params, after: Params) -> dict[str, np.ndarray]:
    """The parameters that differ, by path."""
    old = flatten(before)
    return {
        path: np.asarray(value)
        for path, value in flatten(after).items()
        if value is not old[path] and not np.array_equal(np.asarray(value), np.asarray(old[path]))
    }


def _load_calibrated(folder: Path, identity: str, params: Params) -> Calibrated | None:
    path = folder / _CALIBRATED
    arrays = saved_state.load_by_all(path, identity)
    if arrays is None:
        return None
    flat = flatten(params)
    changed, aim = (
        {name.removeprefix(part): value for name, value in arrays.items() if name.startswith(part)}
        for part in ("params/", "original/")
    )
    known = [f"{part}/{name}" for part in ("params", "original") for name in flat]
    saved_state.check_names(path, arrays, ["artefact", *(name for name in known if name in arrays)])
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "calibrated.safetensors"
        file.write_bytes(arrays["artefact"].tobytes())
        transformed = unflatten(flat | changed)
        original = unflatten(flat | changed | aim) if aim else transformed
        return Calibrated(artefact.load(file), transformed, original)
