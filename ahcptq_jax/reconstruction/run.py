"""The reconstruction of a calibrated model, unit by unit in forward order.

Each unit is fitted to the floating-point model's output, on inputs from the finished, deterministic quantized model.
Finished units are kept in a folder, where a run that was killed goes on; it ends with the same numbers.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from ahcptq_jax import devices
from ahcptq_jax.architectures import architecture_of
from ahcptq_jax.architectures.sites import flatten, unflatten
from ahcptq_jax.calibration import saved_state
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers.kinds import kind_of
from ahcptq_jax.reconstruction import learning
from ahcptq_jax.reconstruction.config import ReconstructionConfig
from ahcptq_jax.reconstruction.fit import Ending, fit
from ahcptq_jax.reconstruction.folder import StateFolder, UnitState
from ahcptq_jax.reconstruction.objectives import Objective, Place, objective_named
from ahcptq_jax.reconstruction.together import Deal, mesh_of
from ahcptq_jax.reconstruction.units import (
    Args,
    Dataset,
    Unit,
    capture_decoder,
    gather,
    reconstruction_error,
    run_unit,
)
from ahcptq_jax.runtime.quantized import Quantized
from sam_flax.errors import InputError
from sam_flax.sam import Params
from sam_flax.stages import EMBEDDED, check_order, dead_after, joined


@dataclasses.dataclass(frozen=True)
class UnitReport:
    """The report of one unit's reconstruction.

    Attributes:
        name: the unit's.
        before: error of the calibrated unit on its inputs, averaged over the calibration images (see
            `units.reconstruction_error`); its groups of channels are those of the start.
        after: error of the finished unit.
        seconds: spent in this process; 0 if it was done before.
    """

    name: str
    before: float
    after: float
    seconds: float


def reconstruct(
    sam: Any,
    params: Params,
    quantized: Quantized,
    images: Sequence[Float32[np.ndarray, "s s 3"]],
    boxes: Sequence[Float32[np.ndarray, "p 4"]],
    config: ReconstructionConfig,
    *,
    target: QuantConfig | None = None,
    original: Params | None = None,
    progress: bool = False,
    state_dir: str | Path | None = None,
    on_unit: Callable[[UnitReport], None] | None = None,
) -> Quantized:
    """Learns rounding and scales of a calibrated model.

    Args:
        sam: the module.
        params: the floating-point parameters that were quantized, after all transforms: `Calibrated.params`.
        quantized: the calibrated model. For CAG's progressive grouping, calibrate with `groups=0`.
        images: the calibration canvases, normalised and padded.
        boxes: for each image its prompts, equally many for all, in canvas pixels.
        config: the settings of the reconstruction.
        target: the configuration to end with, whose `groups` the channels are brought down to; by default that of
            `quantized`. Only `groups`, `group_metric` and `grid_bits` may differ.
        original: the floating-point parameters whose outputs are aimed at, `Calibrated.original`; by default `params`.
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
    _check_parameters(params, quantized)
    given = (list(images), list(boxes)) if original is None else (list(images), list(boxes), original)
    identity = saved_state.fingerprint(
        saved_state.code_version(), config.result_settings(), target, params, quantized, *given
    )
    folder = None if state_dir is None else Path(state_dir)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    architecture = architecture_of(sam)
    encoder, decoder = architecture.encoder_units(sam, config.granularity), architecture.decoder_units(sam)
    if config.decoder_granularity == "whole":
        decoder = [architecture.whole_decoder(sam)]
    total = config.iterations * sum(unit.part in config.parts for unit in [*encoder, *decoder])
    with tqdm(total=total, desc="reconstruct", disable=not progress, mininterval=1) as bar:
        start = dataclasses.replace(
            quantized, activations=learning.with_static_grids(quantized.activations, target.grid_bits)
        )
        aim = params if original is None else original
        deal = Deal(config.batch, len(images), mesh_of(config.batch))
        run = _Run(sam, params, aim, start, boxes, config, target, StateFolder(folder, identity), bar, on_unit, deal)
        clean, noisy = _reconstruct_encoder(run, encoder, [images[i] for i in deal.own])
        _reconstruct_decoder(run, decoder, clean, noisy)
    return Quantized(quantized.params, run.weights, run.activations, sam, target)


def _check(
    quantized: Quantized, images: Sequence[np.ndarray], boxes: Sequence[np.ndarray], target: QuantConfig
) -> None:
    """Raises InputError unless images, boxes and target fit the calibrated model."""
    if not images or len(images) != len(boxes):
        raise InputError(f"There are {len(images)} calibration images and {len(boxes)} sets of boxes; give as many.")
    if len({np.shape(b) for b in boxes}) != 1:
        raise InputError("Calibration images have different numbers of boxes; give each the same number.")
    size = quantized.config.img_size
    for index, image in enumerate(images):
        if np.shape(image) != (size, size, 3) or np.asarray(image).dtype != np.float32 or not np.isfinite(image).all():
            raise InputError(
                f"Calibration image {index} is no canvas; give ({size}, {size}, 3) finite float32 numbers, as "
                "calibration.images.prepare makes them, or call ahcptq_jax.quantize with the images themselves."
            )
    have = quantized.quant_config
    same = {name: getattr(have, name) for name in ("groups", "group_metric", "grid_bits")}
    if dataclasses.replace(target, **same) != have or have.grid_bits not in (0, target.grid_bits):
        raise InputError(
            "The model was calibrated with another configuration than the one to end with; calibrate anew."
        )
    grouped = have.cag and have.groups
    if grouped and (
        not 0 < target.groups <= grouped or (target.groups == grouped and target.group_metric != have.group_metric)
    ):
        raise InputError(
            f"The model was calibrated with {grouped} groups by {have.group_metric!r}, which cannot become "
            f"{target.groups or 'one a channel'} by {target.group_metric!r}; calibrate with groups=0."
        )


def _check_parameters(params: Params, quantized: Quantized) -> None:
    """Raises InputError unless the parameters are those that were quantized.

    What is left in floating point tells: it is the same to the bit, or rounded to half precision as a file rounds it.
    """
    flat, rest = flatten(params), flatten(quantized.params)
    shapes = {path: np.shape(value) for path, value in rest.items()}
    shapes |= {f"{layer}/kernel": weight.shape for layer, weight in quantized.weights.items()}
    found = {path: np.shape(value) for path, value in flat.items()}
    if found != shapes:
        odd = min(path for path in found.keys() | shapes.keys() if found.get(path) != shapes.get(path))
        raise InputError(f"The parameters are not those that were quantized: {odd} has another shape, or none.")
    for path, value in rest.items():
        ours, theirs = np.asarray(flat[path], np.float32), np.asarray(value, np.float32)
        with np.errstate(over="ignore"):
            rounded = ours.astype(np.float16).astype(np.float32)
        if not np.array_equal(ours, theirs) and not np.array_equal(rounded, theirs):
            raise InputError(
                f"The parameters are not those that were quantized: {path} has other values; pass Calibrated.params, "
                "which are those after all transforms."
            )


class _Run:
    """The state that one call of `reconstruct` carries from unit to unit."""

    def __init__(
        self,
        sam: Any,
        params: Params,
        aim: Params,
        quantized: Quantized,
        boxes: Sequence[np.ndarray],
        config: ReconstructionConfig,
        target: QuantConfig,
        folder: StateFolder,
        bar: tqdm,
        on_unit: Callable[[UnitReport], None] | None,
        deal: Deal,
    ) -> None:
        self.sam, self.architecture, self.deal = sam, architecture_of(sam), deal
        self.boxes = [boxes[index] for index in deal.own]  # as everything else by image, this process's alone
        self.floating = {path: jnp.asarray(value, jnp.float32) for path, value in flatten(params).items()}
        # What the units aim at; the floating-point parameters themselves but for transforms that change the function.
        self.aim = (
            self.floating
            if aim is params
            else {path: jnp.asarray(value, jnp.float32) for path, value in flatten(aim).items()}
        )
        self.params = unflatten(self.aim)
        self.remainder = flatten(quantized.params)  # what the quantized model leaves in floating point
        self.weights = dict(quantized.weights)
        self.activations = dict(quantized.activations)
        self.config, self.target, self.folder, self.bar, self.on_unit = config, target, folder, bar, on_unit
        self.prepare = objective_named(config.objective)

    def gather(self, rows: Iterable[Sequence[Any]], count: int, share: float) -> Args:
        """The stacked rows, see `units.gather`; they may take a `share` of the memory budget."""
        return gather(rows, count, int(self.config.memory_budget * share), self.folder.folder)

    def original(self, unit: Unit) -> Callable[[Args], Any]:
        """The floating-point unit as a function from a row of inputs to its output."""
        return partial(run_unit, unit.operation, unflatten(unit.own(self.aim)), {}, {})

    def current(self, unit: Unit) -> Callable[[Args], Any]:
        """The quantized unit as a function from a row of inputs to its output."""
        # With room for all groups, so that units with more and fewer of them are one program.
        quantizers = {site: learning.padded(q) for site, q in unit.own(self.activations).items()}
        own = unflatten(unit.own(self.remainder))
        return partial(run_unit, unit.operation, own, unit.own(self.weights), quantizers)

    def error(self, unit: Unit, data: Dataset) -> float:
        """The error of the quantized unit, averaged over the images."""
        run, rows = self.current(unit), zip(_rows(data.quantized), data.target, strict=True)
        own = [reconstruction_error(unit, np.asarray(run(a)), t) for a, t in rows]
        return float(np.mean(devices.in_order_of_images(dict(zip(self.deal.own, own, strict=True)), self.deal.images)))

    def state(self, unit: Unit, before: float = 0.0, after: float = 0.0) -> UnitState:
        """The part of the quantized model that belongs to a unit, as it is now."""
        return UnitState(unit.own(self.weights), unit.own(self.activations), before, after)

    def take(self, unit: Unit, state: UnitState) -> None:
        """Puts a unit's weights and quantizers into the quantized model."""
        self.weights |= {unit.prefix + layer: weight for layer, weight in state.weights.items()}
        self.activations |= {unit.prefix + site: quantizer for site, quantizer in state.quantizers.items()}

    def learns(self, unit: Unit) -> bool:
        """Whether anything of the unit is learned; else its calibration is kept."""
        return unit.part in self.config.parts

    def finish(self, unit: Unit, dataset: Callable[[], Dataset]) -> None:
        """Takes a finished unit from the state folder, or learns it on its data."""
        state = self.folder.load(unit, self.state(unit))
        if state is not None:
            self.take(unit, state)
            self.bar.update(self.config.iterations * self.learns(unit))
            report = UnitReport(unit.name, state.before, state.after, 0.0)
        else:
            report = _reconstruct_unit(self, unit, dataset())
        if self.on_unit is not None:
            self.on_unit(report)


def _rows(arrays: Args) -> Iterator[Args]:
    """The rows of arrays that have equally many."""
    return zip(*arrays, strict=True)


def _reconstruct_encoder(run: _Run, units: Sequence[Unit], images: Sequence[np.ndarray]) -> tuple[Args, Args]:
    """All units of the encoder; returns its outputs, each (N, 1, ...), of the original and of the quantized model."""
    outputs = run.architecture.unit_outputs(run.sam, run.config.granularity)
    steps = [(unit.name, unit.inputs) for unit in units]
    check_order(steps, outputs)
    dead = dead_after(steps, outputs)
    # What is held at once at most: both models' values that a later unit takes, target and outputs, and copies on the
    # device; in a chain six.
    share = 1 / (4 + 2 * _most_alive(steps, dead))
    collect = partial(run.gather, count=len(images), share=share)
    embed = partial(run.architecture.embed, run.sam, run.params)
    (embedded,) = collect((embed(jnp.asarray(image[None])),) for image in images)
    original, current = {EMBEDDED: embedded}, {EMBEDDED: embedded}
    for unit, over in zip(units, dead, strict=True):
        clean, noisy = (tuple(values[name] for name in unit.inputs) for values in (original, current))
        (target,) = collect((row,) for row in map(run.original(unit), _rows(clean)))
        run.finish(unit, partial(Dataset, noisy, clean, target))
        (current[unit.name],) = collect((row,) for row in map(run.current(unit), _rows(noisy)))
        original[unit.name] = target
        for name in over:
            del original[name], current[name]
    return tuple(original[name] for name in outputs), tuple(current[name] for name in outputs)


def _most_alive(steps: Sequence[tuple[str, tuple[str, ...]]], dead: Sequence[set[str]]) -> int:
    """The most values that are still to be taken while a step runs, its inputs among them."""
    alive, most = {EMBEDDED}, 1
    for (key, _), over in zip(steps, dead, strict=True):
        most = max(most, len(alive))
        alive = (alive | {key}) - over
    return most


def _reconstruct_decoder(run: _Run, units: Sequence[Unit], original: Args, current: Args) -> None:
    """All units of the decoder, given the encoder's outputs, each (N, 1, ...), of both models."""
    names = tuple(unit.name for unit in units)
    parts = tuple(f"{part}/" for part in run.architecture.decoder_parts)
    capture = partial(capture_decoder, run.sam, names=names)
    floating = run.architecture.decoder(run.params)
    remainder = unflatten({path: v for path, v in run.remainder.items() if path.startswith(parts)})

    def dataset(unit: Unit) -> Dataset:
        weights = {path: w for path, w in run.weights.items() if path.startswith(parts)}
        # With room for all groups, so that what the units before have grouped is no other program.
        activations = {path: learning.padded(q) for path, q in run.activations.items() if path.startswith(parts)}

        def rows() -> Iterator[Args]:
            for clean, noisy, prompts in zip(_rows(original), _rows(current), run.boxes, strict=True):
                args, output = capture(floating, {}, {}, joined(clean), prompts)[unit.name]
                if isinstance(output, tuple):  # the whole decoder's, of which the unit returns what counts
                    output = run.original(unit)(args)
                yield *capture(remainder, weights, activations, joined(noisy), prompts)[unit.name][0], *args, output

        *inputs, output = run.gather(rows(), len(run.boxes), 1 / 2)
        half = len(inputs) // 2
        return Dataset(tuple(inputs[:half]), tuple(inputs[half:]), output)

    for unit in units:
        run.finish(unit, partial(dataset, unit))


def _reconstruct_unit(run: _Run, unit: Unit, data: Dataset) -> UnitReport:
    """Learns one unit, takes it into the quantized model and saves it."""
    began, before = time.perf_counter(), run.error(unit, data)
    weights, quantizers = unit.own(run.weights), unit.own(run.activations)
    config, objective = run.config, Objective(_no_loss)
    if run.learns(unit):
        objective = run.prepare(Place(unit, run.architecture, run.sam, run.params, run.boxes), config.loss_power)
        data = dataclasses.replace(data, context=objective.context)
    else:
        # Its calibration is kept, but its channels are grouped like all others.
        config = dataclasses.replace(config, iterations=0, learn_rounding=False, learn_scales=False)
    groups = run.target.groups
    if not any(kind_of(q).groups(q) > groups for q in quantizers.values()):
        groups = 0
    problem, state = learning.start(unflatten(unit.own(run.floating)), weights, quantizers, config)
    ending = Ending(groups, run.target.group_metric, run.target.grid_bits)
    state = fit(unit, problem, state, data, objective, config, ending, run.folder, run.bar, run.deal)
    found = UnitState(*learning.finish(problem, state, weights, quantizers, groups, run.target.grid_bits), before)
    run.take(unit, found)
    found = dataclasses.replace(found, after=run.error(unit, data))
    run.folder.save(unit, found)
    return UnitReport(unit.name, before, found.after, time.perf_counter() - began)


def _no_loss(output: jax.Array, target: jax.Array, context: tuple[jax.Array, ...], shared: Any) -> jax.Array:
    """The loss of a unit that is not learned: never called, since there are no iterations."""
    raise AssertionError("a unit without iterations has no loss")
