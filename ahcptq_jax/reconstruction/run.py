"""`reconstruct`: a calibrated model made better, unit by unit in forward order.

Each unit is fitted to the floating-point model's output, on inputs from the finished, deterministic quantized model.
What is done is kept in a folder: a run that is killed goes on there and ends with the same numbers.
"""

import dataclasses
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ahcptq_jax.api import check_model, prepare_images, quantize_prepared
from ahcptq_jax.architectures.sites import flatten, unflatten
from ahcptq_jax.calibration import saved_state
from ahcptq_jax.calibration.cache import StatisticsCache
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.formats import artefact
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.quantizers.kinds import kind_of
from ahcptq_jax.quantizers.searches.grouping import ladder_stages
from ahcptq_jax.reconstruction import learning
from ahcptq_jax.reconstruction.learning import ReconstructionConfig
from ahcptq_jax.reconstruction.units import (
    Args,
    Dataset,
    Feeder,
    Unit,
    align_signs,
    capture_decoder,
    decoder_units,
    encoder_units,
    gather,
    reconstruction_error,
    run_unit,
)
from ahcptq_jax.runtime.quantized import Quantized
from sam_flax.encoders.vit import PatchEmbed
from sam_flax.sam import Params, Sam, apply_embed


@dataclasses.dataclass(frozen=True)
class UnitReport:
    """How the reconstruction of a unit went.

    Attributes:
        name: of the unit.
        before: error of the calibrated unit on its inputs, averaged over the calibration images (see
            `blocks.reconstruction_error`); its groups of channels are those of the start.
        after: error of the finished unit.
        seconds: spent in this process; 0 if it was done before.
    """

    name: str
    before: float
    after: float
    seconds: float


def quantize_reconstructed(
    sam: Sam,
    params: Params,
    calib: Iterable[Any],
    config: QuantConfig,
    reconstruction: ReconstructionConfig,
    *,
    progress: bool = True,
    state_dir: str | Path | None = None,
    on_unit: Callable[[UnitReport], None] | None = None,
    cache: StatisticsCache | None = None,
) -> Quantized:
    """Calibrates as `quantize.quantize_model` does, then reconstructs; arguments as there and in `reconstruct`.

    Channels stay on their own and quantizers off the grid in the calibration; they are grouped, and put on it, while
    they are learned.

    Raises:
        ValueError: as both of them.
    """
    check_model(sam, params)
    images = prepare_images(calib, sam, config)
    folder = None if state_dir is None else Path(state_dir)
    start = dataclasses.replace(config, groups=0, grid_bits=0)
    inputs = [(image.canvas, image.boxes) for image in images]
    identity = saved_state.fingerprint(saved_state.code_version(), sam.config, start, params, inputs)
    calibrated = None if folder is None else _load_calibrated(folder, identity)
    if calibrated is None:
        calibrated = quantize_prepared(
            sam,
            params,
            images,
            start,
            progress=progress,
            state_dir=None if folder is None else folder / "calibration",
            cache=cache,
        )
        if folder is not None:
            _save_calibrated(folder, identity, calibrated)
    finished = reconstruct(
        sam,
        params,
        calibrated,
        [image.canvas for image in images],
        [image.boxes for image in images],
        reconstruction,
        target=config,
        progress=progress,
        state_dir=state_dir,
        on_unit=on_unit,
    )
    return finished.with_rounded_remainder()


# The whole calibration is kept: a unit's identity rests on its last bits, which may be others on other processors.
_CALIBRATED = "calibrated.npz"


def _save_calibrated(folder: Path, identity: str, calibrated: Quantized) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        file = Path(scratch) / "calibrated.safetensors"
        artefact.save(calibrated, file)
        content = np.frombuffer(file.read_bytes(), np.uint8)
    saved_state.save(folder / _CALIBRATED, identity, {"artefact": content})


def _load_calibrated(folder: Path, identity: str) -> Quantized | None:
    path = folder / _CALIBRATED
    arrays = saved_state.load(path, identity)
    if arrays is None:
        return None
    saved_state.check_names(path, arrays, ["artefact"])
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "calibrated.safetensors"
        file.write_bytes(arrays["artefact"].tobytes())
        return artefact.load(file)


def reconstruct(
    sam: Sam,
    params: Params,
    quantized: Quantized,
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    config: ReconstructionConfig,
    *,
    target: QuantConfig | None = None,
    progress: bool = False,
    state_dir: str | Path | None = None,
    on_unit: Callable[[UnitReport], None] | None = None,
) -> Quantized:
    """Learns rounding and scales of a calibrated model.

    Args:
        sam: the module.
        params: the floating-point parameters that were quantized.
        quantized: the calibrated model. For CAG's progressive grouping, calibrate with `groups=0`.
        images: calibration canvases (S, S, 3), normalised and padded.
        boxes: for each image, prompts (P, 4) in canvas pixels; P is the same for all.
        config: how to learn.
        target: the configuration to end with, whose `groups` the channels are brought down to; by default that of
            `quantized`. Only `groups`, `group_metric` and `grid_bits` may differ.
        progress: shows a bar on stderr.
        state_dir: where finished units are kept, and found again by a later run with the same arguments.
        on_unit: called after each unit, when it has been saved.

    Returns:
        The same model with other codes and scales; nothing in it is random or soft.

    Raises:
        ValueError: if the arguments do not belong together, or a file in `state_dir` is damaged or foreign.
    """
    target = quantized.quant_config if target is None else target
    _check(quantized, images, boxes, target)
    run = _Run(align_signs(params, quantized), quantized, config, target, state_dir, on_unit)
    run.identity = saved_state.fingerprint(
        saved_state.code_version(), config.result_settings(), target, params, quantized, list(images), list(boxes)
    )
    units = encoder_units(sam, config.granularity) + decoder_units(sam)
    total = config.iterations * sum(unit.part in config.parts for unit in units)
    with tqdm(total=total, desc="reconstruct", disable=not progress, mininterval=1) as run.bar:
        original, current = _reconstruct_encoder(run, sam, images)
        _reconstruct_decoder(run, sam, original, current, boxes)
    return Quantized(quantized.params, run.weights, run.activations, sam, target)


def _check(
    quantized: Quantized, images: Sequence[np.ndarray], boxes: Sequence[np.ndarray], target: QuantConfig
) -> None:
    if not images or len(images) != len(boxes):
        raise ValueError(f"There are {len(images)} calibration images and {len(boxes)} sets of boxes; give as many.")
    if len({np.shape(b) for b in boxes}) != 1:
        raise ValueError("Calibration images have different numbers of boxes; give each the same number.")
    size = quantized.config.img_size
    for index, image in enumerate(images):
        if np.shape(image) != (size, size, 3) or np.asarray(image).dtype != np.float32 or not np.isfinite(image).all():
            raise ValueError(
                f"Calibration image {index} is no canvas; give ({size}, {size}, 3) finite float32 numbers, as "
                "quantize.prepare makes them, or call quantize_reconstructed with the images themselves."
            )
    have = quantized.quant_config
    same = {name: getattr(have, name) for name in ("groups", "group_metric", "grid_bits")}
    if dataclasses.replace(target, **same) != have or have.grid_bits not in (0, target.grid_bits):
        raise ValueError(
            "The model was calibrated with another configuration than the one to end with; calibrate anew."
        )
    grouped = have.cag and have.groups
    if grouped and (
        not 0 < target.groups <= grouped or (target.groups == grouped and target.group_metric != have.group_metric)
    ):
        raise ValueError(
            f"The model was calibrated with {grouped} groups by {have.group_metric!r}, which cannot become "
            f"{target.groups or 'one a channel'} by {target.group_metric!r}; calibrate with groups=0."
        )


class _Run:
    """What one call of `reconstruct` carries from unit to unit."""

    identity: str
    bar: tqdm

    def __init__(
        self,
        params: Params,
        quantized: Quantized,
        config: ReconstructionConfig,
        target: QuantConfig,
        state_dir: str | Path | None,
        on_unit: Callable[[UnitReport], None] | None,
    ):
        self.params = params  # floating point, nested
        self.remainder = flatten(quantized.params)  # what the quantized model leaves in floating point
        self.weights = dict(quantized.weights)
        self.activations = dict(quantized.activations)
        self.config, self.target, self.on_unit = config, target, on_unit
        self.state_dir = None if state_dir is None else Path(state_dir)
        if self.state_dir is not None:
            self.state_dir.mkdir(parents=True, exist_ok=True)

    def gather(self, rows: Iterable[Sequence[Any]], count: int, share: float) -> Args:
        """See `blocks.gather`; `share` of the memory budget is theirs."""
        return gather(rows, count, int(self.config.memory_budget * share), self.state_dir)

    def original(self, unit: Unit) -> Callable[[Args], jax.Array]:
        """The floating-point unit: a row of inputs -> its output."""
        return partial(run_unit, unit.operation, unflatten(unit.own(flatten(self.params))), {}, {})

    def current(self, unit: Unit) -> Callable[[Args], jax.Array]:
        """The quantized unit: a row of inputs -> its output."""
        # With room for all groups, so that units with more and fewer of them are one program.
        quantizers = {site: learning.padded(q) for site, q in unit.own(self.activations).items()}
        own = unflatten(unit.own(self.remainder))
        return partial(run_unit, unit.operation, own, unit.own(self.weights), quantizers)

    def error(self, unit: Unit, data: Dataset) -> float:
        """Of the quantized unit, averaged over the images."""
        run, rows = self.current(unit), zip(_rows(data.quantized), data.target, strict=True)
        return float(np.mean([reconstruction_error(unit, np.asarray(run(a)), t) for a, t in rows]))

    def file(self, unit: Unit, kind: str) -> Path | None:
        return None if self.state_dir is None else self.state_dir / f"{unit.name.replace('/', '.')}.{kind}.npz"

    def load(self, unit: Unit) -> UnitReport | None:
        """Takes over a finished unit from the state folder, if it is there."""
        path = self.file(unit, "done")
        arrays = saved_state.load(path, self.identity) if path is not None else None
        if path is None or arrays is None:
            return None
        report = self._unpack(unit, path, arrays)
        if (partial_path := self.file(unit, "partial")) is not None:
            # A run killed between saving the unit and this left it.
            saved_state.remove(partial_path)
        self.bar.update(self.config.iterations * (unit.part in self.config.parts))
        return report

    def finished(self, unit: Unit, report: UnitReport) -> None:
        """Saves a unit and drops its intermediate state."""
        path = self.file(unit, "done")
        if path is not None:
            saved_state.save(path, self.identity, self._pack(unit, report))
        if (partial_path := self.file(unit, "partial")) is not None:
            saved_state.remove(partial_path)

    def _pack(self, unit: Unit, report: UnitReport) -> dict[str, Any]:
        arrays: dict[str, Any] = {"errors": np.array([report.before, report.after])}
        arrays |= {f"codes/{layer}": weight.packed for layer, weight in unit.own(self.weights).items()}
        for site, quantizer in unit.own(self.activations).items():
            arrays |= {f"site/{site}/{name}": value for name, value in _arrays_of(quantizer).items()}
        return arrays

    def _unpack(self, unit: Unit, path: Path, arrays: dict[str, np.ndarray]) -> UnitReport:
        # Only grouped quantizers change their shapes, and only in the number of groups.
        report = UnitReport(unit.name, 0.0, 0.0, 0.0)
        template = self._pack(unit, report)
        saved_state.check_names(path, arrays, template)
        before, after = arrays["errors"]
        for layer, weight in unit.own(self.weights).items():
            packed = arrays[f"codes/{layer}"]
            if packed.shape != weight.packed.shape or packed.dtype != np.uint8:
                raise saved_state.damaged(path, f"the codes of {layer} have a wrong shape")
            self.weights[unit.prefix + layer] = dataclasses.replace(weight, packed=jnp.asarray(packed))
        for site, quantizer in unit.own(self.activations).items():
            fields: dict[str, Any] = {
                name: jnp.asarray(arrays[f"site/{site}/{name}"]) for name in _arrays_of(quantizer)
            }
            per_channel = kind_of(quantizer).channel_fields
            channels = np.shape(fields[per_channel[0]])[0] if per_channel else None
            try:
                self.activations[unit.prefix + site] = dataclasses.replace(quantizer, **fields).validate(channels)
            except ValueError as error:
                raise saved_state.damaged(path, f"{site}: {error}") from error
        return dataclasses.replace(report, before=float(before), after=float(after))


def _arrays_of(quantizer: Quantizer) -> dict[str, Any]:
    """A quantizer's leaves by name."""
    kind = kind_of(quantizer)
    return {name: getattr(quantizer, name) for name in kind.fields + kind.channel_fields}


def _rows(arrays: Args) -> Iterator[Args]:
    """The rows of arrays that have equally many."""
    return zip(*arrays, strict=True)


def _reconstruct_encoder(run: _Run, sam: Sam, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All units of the encoder; returns the embeddings (N, 1, g, g, C), floating-point and quantized."""
    module = PatchEmbed(sam.config.patch_size, sam.config.embed_dim, parent=None)
    embed = partial(apply_embed, module, {k: run.params["image_encoder"][k] for k in ("patch_embed", "pos_embed")})
    # Six at most are held at once: inputs of both models, target and outputs, and copies on the device.
    gather = partial(run.gather, count=len(images), share=1 / 6)
    (original,) = gather((embed(jnp.asarray(image[None])),) for image in images)
    current = original
    for unit in encoder_units(sam, run.config.granularity):
        (output,) = gather((row,) for row in map(run.original(unit), _rows((original,))))
        report = run.load(unit)
        if report is None:
            report = _reconstruct_unit(run, unit, Dataset((current,), (original,), output))
        if run.on_unit is not None:
            run.on_unit(report)
        (current,) = gather((row,) for row in map(run.current(unit), _rows((current,))))
        original = output
    return original, current


def _reconstruct_decoder(
    run: _Run, sam: Sam, original: np.ndarray, current: np.ndarray, boxes: Sequence[np.ndarray]
) -> None:
    """All units of the decoder, given the embeddings (N, 1, g, g, C) of both models."""
    units = decoder_units(sam)
    names = tuple(unit.name for unit in units)
    parts = ("prompt_encoder/", "mask_decoder/")
    capture = partial(capture_decoder, sam, names=names)
    floating = {k: run.params[k] for k in ("prompt_encoder", "mask_decoder")}
    remainder = unflatten({path: v for path, v in run.remainder.items() if path.startswith(parts)})
    for unit in units:
        report = run.load(unit)
        if report is None:
            weights = {path: w for path, w in run.weights.items() if path.startswith(parts)}
            # With room for all groups, so that what the units before have grouped is no other program.
            activations = {path: learning.padded(q) for path, q in run.activations.items() if path.startswith(parts)}

            def rows(unit: Unit = unit, weights: Any = weights, activations: Any = activations) -> Iterator[Args]:
                for clean, noisy, prompts in zip(original, current, boxes, strict=True):
                    args, output = capture(floating, {}, {}, clean, prompts)[unit.name]
                    yield *capture(remainder, weights, activations, noisy, prompts)[unit.name][0], *args, output

            *inputs, output = run.gather(rows(), len(boxes), 1 / 2)
            half = len(inputs) // 2
            report = _reconstruct_unit(run, unit, Dataset(tuple(inputs[:half]), tuple(inputs[half:]), output))
        if run.on_unit is not None:
            run.on_unit(report)


def _reconstruct_unit(run: _Run, unit: Unit, data: Dataset) -> UnitReport:
    """Learns one unit, takes it into the quantized model and saves it."""
    began, before = time.perf_counter(), run.error(unit, data)
    weights, quantizers = unit.own(run.weights), unit.own(run.activations)
    config = run.config
    if unit.part not in config.parts:
        # Its calibration is kept, but its channels are grouped like all others.
        config = dataclasses.replace(config, iterations=0, learn_rounding=False, learn_scales=False)
    groups = run.target.groups
    if not any(kind_of(q).groups(q) > groups for q in quantizers.values()):
        groups = 0
    problem, state = learning.start(unflatten(unit.own(flatten(run.params))), weights, quantizers, config)
    state = _learn(run, unit, problem, state, data, config, groups)
    weights, quantizers = learning.finish(problem, state, weights, quantizers, groups, run.target.grid_bits)
    run.weights |= {unit.prefix + layer: weight for layer, weight in weights.items()}
    run.activations |= {unit.prefix + site: quantizer for site, quantizer in quantizers.items()}
    report = UnitReport(unit.name, before, run.error(unit, data), time.perf_counter() - began)
    run.finished(unit, report)
    return report


def _learn(
    run: _Run,
    unit: Unit,
    problem: learning.Problem,
    state: learning.State,
    data: Dataset,
    config: ReconstructionConfig,
    groups: int,
) -> learning.State:
    """All iterations of a unit, from its intermediate state if one was saved."""
    key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(unit.name.encode()))
    batch_key, step_key = jax.random.split(key)
    # All at once, so that neither chunks nor interruptions change what is drawn.
    drawn = np.asarray(jax.random.randint(batch_key, (config.iterations, config.batch), 0, len(data)))
    rungs = list(zip(config.regroup_steps(), ladder_stages(groups), strict=True)) if groups else []
    first, state = _load_partial(run, unit, state)
    feed = Feeder(data, config.chunk, config.batch, config.memory_budget // 2)
    stops = sorted({first, *range(0, config.iterations, feed.chunk), *(at for at, _ in rungs), config.iterations})
    # What has no influence on a step must not compile it again.
    static = dataclasses.replace(config.result_settings(), seed=0, parts=ReconstructionConfig().parts)
    run.bar.set_description(unit.name)
    run.bar.update(first)
    saved = time.monotonic()
    for step, stop in zip(stops, [*stops[1:], None], strict=True):
        if step < first:
            continue
        if step > first and time.monotonic() - saved >= config.save_seconds:
            _save_partial(run, unit, state, step)
            saved = time.monotonic()
        for at, wanted in rungs:
            if at == step:
                state = learning.regroup(state, wanted, groups, run.target.group_metric)
        if stop is None:
            break
        rows = np.resize(drawn[step:stop], (feed.chunk, config.batch))
        store, places = feed(rows)
        state, losses = learning.advance(
            problem,
            state,
            store,
            jnp.asarray(places, jnp.int32),
            jnp.int32(step),
            jnp.int32(stop),
            step_key,
            operation=unit.operation,
            loss_axis=unit.loss_axis,
            config=static,
            grid_bits=run.target.grid_bits,
        )
        run.bar.update(stop - step)
        if not run.bar.disable:
            error, penalty = np.asarray(losses)
            run.bar.set_postfix(error=f"{error:.3g}", rounding=f"{penalty:.3g}", refresh=False)
    return state


def _save_partial(run: _Run, unit: Unit, state: learning.State, step: int) -> None:
    path = run.file(unit, "partial")
    if path is not None:
        leaves = {f"leaf/{i}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}
        saved_state.save(path, run.identity, leaves | {"step": np.array(step)})


def _load_partial(run: _Run, unit: Unit, state: learning.State) -> tuple[int, learning.State]:
    """The step reached and the state there; 0 and the given state if nothing was saved."""
    path = run.file(unit, "partial")
    arrays = saved_state.load(path, run.identity) if path is not None else None
    if path is None or arrays is None:
        return 0, state
    leaves, structure = jax.tree.flatten(state)
    saved_state.check_names(path, arrays, ["step", *(f"leaf/{i}" for i in range(len(leaves)))])
    found = [arrays[f"leaf/{i}"] for i in range(len(leaves))]
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(found, leaves, strict=True)):
        raise saved_state.damaged(path, "an array has a wrong shape")
    return int(arrays["step"]), jax.tree.unflatten(structure, [jnp.asarray(a) for a in found])
