"""A plan on paper of calibration and learning on many devices: memory, traffic and time, counted and not measured.

    python -m experiments.scaling --models=vit_b,vit_l,vit_h --devices=1,8,64 --out=runs/scaling

Parameters, rows and bytes sent are counted from the shapes of the model and are exact; time follows from counted
operations and the rates given by flags, and assumes what `ASSUMPTIONS` says. Writes `scaling.md` and `scaling.json`.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from ahcptq_jax.architectures import architecture_of
from ahcptq_jax.architectures.base import Unit, traced
from ahcptq_jax.architectures.sites import below, flatten, unflatten
from ahcptq_jax.calibration import passes
from ahcptq_jax.calibration.statistics import relevant
from ahcptq_jax.command import finish, launch
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers.kinds import kind_named
from ahcptq_jax.recipe import Recipe, recipe_of
from ahcptq_jax.reconstruction.units import capture_decoder
from experiments.job.results import write_file, write_json
from sam_flax import CONFIGS, Sam
from sam_flax.errors import InputError
from sam_flax.stages import EMBEDDED, joined

PROMPTS = 8  # of an image
FLOAT = 4  # bytes
ASSUMPTIONS = (
    "A device makes `--tflops` of float32 products; 24 is what SAM-B's encoder reached on one H200 here (31.0 ms).",
    "An iteration takes `--step` forwards of its unit: forward and backward are 3, and 3.5 is that times what drops "
    "and quantizers add to an MLP's step on a CPU (0.895 s against 0.768 s).",
    "The batch has one image a device. A device sends and receives `--link` GB/s, and an exchange waits `--latency` "
    "microseconds; nothing overlaps.",
    "Hosts have 8 devices. The outputs of a unit, four forwards an image, are computed by one device of each host.",
    "Searches over weights and softmax, the grouping of channels, and reading images are not counted: no rate of them "
    "on an accelerator has been measured.",
)


@dataclasses.dataclass(frozen=True)
class UnitCount:
    """What one unit of the reconstruction costs, counted from shapes.

    Attributes:
        name: the unit's.
        operations: multiplications and additions of its forward for one image.
        vector: numbers that an iteration sums over the devices: gradients of rounding and scales, and two losses.
        row: bytes of an image's inputs in both models, and its target.
    """

    name: str
    operations: float
    vector: int
    row: int


def _size(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def _operations(unit: Unit, params: Any, args: tuple[Any, ...]) -> float:
    analysis: Any = jax.jit(unit.operation).lower(params, *args).cost_analysis()
    return float(analysis["flops"])


def _vector(unit: Unit, flat: dict[str, Any], seen: dict[str, tuple[int, ...]], recipe: Recipe) -> int:
    """Gradients of an iteration: a rounding for every quantized weight, and the scales of every site."""
    numbers = 2
    for site in unit.own(seen):
        choice = recipe.at(unit.prefix + site)
        if choice is None:
            continue
        shape = seen[unit.prefix + site]
        kind = kind_named(choice.kind)
        # A quantizer with groups has room for one a channel.
        numbers += (shape[-1] if kind.channel_groups else 1) * len(kind.learned)
        kernel = flat.get(f"{unit.prefix}{site.removesuffix('/input')}/kernel")
        if site.endswith("/input") and kernel is not None:
            numbers += int(np.prod(kernel.shape))
    return numbers


def unit_counts(sam: Sam, config: QuantConfig) -> list[UnitCount]:
    """The counts of all units of a model, in order, by abstract evaluation alone."""
    architecture = architecture_of(sam)
    recipe = recipe_of(architecture, config)
    params = jax.eval_shape(sam.init_params, jax.random.key(0))
    flat, seen = flatten(params), traced(architecture, sam, PROMPTS).seen
    canvas = jax.ShapeDtypeStruct((1, sam.config.img_size, sam.config.img_size, 3), jnp.float32)
    values = {EMBEDDED: jax.eval_shape(partial(architecture.embed, sam), params, canvas)}
    counts = []

    def count(unit: Unit, args: tuple[Any, ...], output: Any) -> None:
        own = unflatten(unit.own(flat))
        row = FLOAT * (2 * _size(args) + _size(output))
        counts.append(UnitCount(unit.name, _operations(unit, own, args), _vector(unit, flat, seen, recipe), row))

    for unit in architecture.encoder_units(sam):
        args = tuple(values[name] for name in unit.inputs)
        values[unit.name] = jax.eval_shape(unit.operation, unflatten(unit.own(flat)), *args)
        count(unit, args, values[unit.name])
    embedding = joined([values[name] for name in architecture.unit_outputs(sam, "part")])
    units = architecture.decoder_units(sam)
    capture = partial(capture_decoder, sam, names=tuple(unit.name for unit in units))
    boxes = jax.ShapeDtypeStruct((PROMPTS, 4), jnp.float32)
    captured = jax.eval_shape(capture, architecture.decoder(params), {}, {}, embedding, boxes)
    for unit in units:
        count(unit, *captured[unit.name])
    return counts


def statistics_bytes(sam: Sam, config: QuantConfig) -> int:
    """Bytes that a device sends to each other one for every image of a calibration: what the encoder's sites tell."""
    architecture = architecture_of(sam)
    recipe = recipe_of(architecture, config)
    params = jax.eval_shape(sam.init_params, jax.random.key(0))
    flat = flatten(params)
    own = {stage.key: unflatten(below(stage.prefix, flat)) for stage in architecture.stages(sam).stages}
    sites, states, _ = passes.discover_stages(sam, params, own, recipe)
    total = 0
    for stage, of_stage in states.items():
        for rule in relevant(sites[stage], config)[0]:
            times = 1 + (kind_named(rule.kind).statistic.outline is not None)
            total += times * FLOAT * _size(of_stage[rule.path])
    return total


@dataclasses.dataclass(frozen=True)
class Rates:
    """What is assumed of the machines; see `ASSUMPTIONS`."""

    tflops: float
    step: float
    link: float
    latency: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan for a model on a number of devices; times in hours, memory and traffic of one device in GiB.

    Attributes:
        devices: how many.
        memory: parameters, the largest unit's rows, gradients and optimizer; not the activations of a step.
        sent: by a device while all units learn.
        learning: of all iterations, each with an image a device.
        exchange: the part of `learning` in which gradients are exchanged.
        divided: `learning` with as many times fewer iterations, which see as many images in all.
        outputs: of the units, before and after each.
        encoder: of the calibration's forwards, searches not counted.
    """

    devices: int
    memory: float
    sent: float
    learning: float
    exchange: float
    divided: float
    outputs: float
    encoder: float


def sent_in_a_step(vector: int, devices: int) -> float:
    """Bytes that a device sends in one iteration: a part of the sum to every other, twice."""
    return 2 * FLOAT * (-(-vector // devices)) * (devices - 1)


def plan(sam: Sam, counts: list[UnitCount], devices: int, images: int, iterations: int, rates: Rates) -> Plan:
    """The plan for one number of devices."""
    params = _size(jax.eval_shape(sam.init_params, jax.random.key(0)))
    rows = -(-images // devices)
    # Rounding, two moments, a gradient, and the vector that is summed.
    memory = max(FLOAT * 5 * c.vector + rows * c.row for c in counts) + FLOAT * params
    sent = sum(iterations * sent_in_a_step(c.vector, devices) for c in counts)
    compute = sum(c.operations for c in counts) * rates.step / (rates.tflops * 1e12) * iterations
    exchange = sent / (rates.link * 1e9) + (devices > 1) * 2 * rates.latency * 1e-6 * iterations * len(counts)
    forward = sum(c.operations for c in counts) / (rates.tflops * 1e12)
    hosts = -(-devices // 8)
    learning = (compute + exchange) / 3600
    return Plan(
        devices,
        memory / 2**30,
        sent / 2**30,
        learning,
        exchange / 3600,
        learning / devices,
        4 * forward * -(-images // hosts) / 3600,
        forward * rows / 3600,
    )


def table(model: str, plans: list[Plan]) -> str:
    """The plans of a model as rows of a Markdown table."""
    lines = []
    for p in plans:
        cells = (model, p.devices, f"{p.memory:.1f}", f"{p.sent:,.0f}", f"{p.learning:.1f}", f"{p.exchange:.2f}")
        more = (f"{p.divided:.2f}", f"{p.outputs * 60:.1f}", f"{p.encoder * 60:.2f}")
        lines.append("| " + " | ".join(map(str, (*cells, *more))) + " |")
    return "\n".join(lines)


HEADER = (
    "| model | devices | memory of one, GiB | sent by one, GiB | learning, h | of it exchange, h "
    "| learning as many images in all, h | outputs of units, min | forwards of calibration, min |\n" + "|---" * 9 + "|"
)


def main(argv: list[str]) -> int:
    return finish(argv, _command)


def _command() -> int:
    found = flags.FLAGS
    names = found.models.split(",")
    if unknown := [name for name in names if name not in CONFIGS]:
        raise InputError(f"--models={found.models} has {unknown[0]!r}; choose of {', '.join(CONFIGS)}.")
    try:
        numbers = [int(n) for n in found.devices.split(",")]
    except ValueError:
        raise InputError(f"--devices={found.devices} must be whole numbers, such as 1,8,64.") from None
    if min(numbers) < 1:
        raise InputError(f"--devices={found.devices} must be at least 1 each.")
    rates = Rates(found.tflops, found.step, found.link, found.latency)
    rows, kept = [HEADER], {}
    for name in names:
        sam = Sam(CONFIGS[name])
        counts = unit_counts(sam, QuantConfig())
        plans = [plan(sam, counts, n, found.images, found.iterations, rates) for n in numbers]
        rows.append(table(name, plans))
        kept[name] = {
            "units": [dataclasses.asdict(c) for c in counts],
            "statistics_bytes": statistics_bytes(sam, QuantConfig()),
            "plans": [dataclasses.asdict(p) for p in plans],
        }
    text = "\n".join([*rows, "", *(f"- {line}" for line in ASSUMPTIONS), ""])
    write_file(Path(found.out) / "scaling.md", text)
    write_json(Path(found.out) / "scaling.json", kept)
    print(text)
    for name, of_model in kept.items():
        print(f"{name}: a device tells each other {of_model['statistics_bytes']:,} bytes of an image in calibration.")
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("models", "vit_b,vit_l,vit_h", "Models, of " + ", ".join(CONFIGS) + ".")
    flags.DEFINE_string("devices", "1,8,64", "Numbers of devices.")
    flags.DEFINE_integer("images", 32, "Calibration images.", lower_bound=1)
    flags.DEFINE_integer("iterations", 20000, "Iterations of each unit.", lower_bound=1)
    flags.DEFINE_float("tflops", 24.0, "Float32 operations of a device, in 10^12 a second.", lower_bound=0.001)
    flags.DEFINE_float("step", 3.5, "Forwards that an iteration takes as long as.", lower_bound=1)
    flags.DEFINE_float("link", 25.0, "Bytes that a device sends, in 10^9 a second.", lower_bound=0.001)
    flags.DEFINE_float("latency", 30.0, "Microseconds that an exchange waits.", lower_bound=0)
    flags.DEFINE_string("out", "runs/scaling", "Folder for scaling.md and scaling.json.")
    launch(main)
