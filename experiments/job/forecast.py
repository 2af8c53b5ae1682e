"""What a run would do, and about how long and how much memory it would take, before it does anything.

Seconds come of the operations that `hwcost` counts for the model, of how many products this machine makes a second
(measured when asked), and of how often each stage goes through the model. The factors were taken from runs on two
processors (results/README.md): they tell minutes from hours, and are off by up to two or three elsewhere.
"""

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from experiments.job.options import FLOAT, Options
from experiments.job.plan import Inputs
from hwcost.counts.counts import count
from sam_flax.sam import Sam

# Share of the machine's float32 product rate that the encoder reaches: 0.73 to 0.81 for SAM-B, -L and -H.
_REACHED = 0.75
# How many passes of the floating-point model a stage costs.
_QUANTIZED_PASSES = 1.6  # an evaluation of the quantized model, MINI and SAM-B
_CALIBRATION_PASSES = 5.0  # an image of a calibration with its searches, SAM-B: 24 minutes for 32
_STEP_PASSES = 4.0  # one iteration of every unit, forward and backward on quantized inputs, SAM-B
# An image costs at least so many seconds, for what is not the model: reading, resizing, run lengths, calls.
_LEAST_SECONDS = 0.03
_COMPILE_SECONDS = {"evaluate": 4.0, "quantize": 30.0}
# The search of weights, in seconds for each parameter (12 searches of 768 x 3072 take 24 s).
_WEIGHT_SEARCH = 0.84e-6
# Memory in bytes: the process with its libraries, and what compilers and searches need besides.
_PROCESS, _SEARCHES = 450 * 2**20, 1200 * 2**20
_MAP_CHUNK = 256 * 2**20  # of attention, logits and masks at a time


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a run would cost.

    Attributes:
        seconds: of each stage, by its name in `results.json`.
        memory: bytes at the peak, of the process or of the accelerator.
        speed: float32 products of this machine, in multiply-accumulates a second.
    """

    seconds: dict[str, float]
    memory: int
    speed: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def product_rate(size: int = 1024, runs: int = 3) -> float:
    """Multiply-accumulates a second of a float32 matrix product on the default device; the best of some runs."""
    multiply = jax.jit(lambda a, b: a @ b)
    a = jnp.ones((size, size))
    jax.block_until_ready(multiply(a, a))
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(multiply(a, a))
        best = min(best, time.perf_counter() - start)
    return size**3 / best


def forecast(inputs: Inputs, options: Options, speed: float) -> Forecast:
    """What a run would cost; see the head of this module for how far to trust it.

    Args:
        inputs: what it works on.
        options: the run.
        speed: from `product_rate`.
    """
    encode, decode = _seconds_of_passes(inputs.sam, speed)
    prompted = [len(boxes) for boxes in inputs.boxes.per_image.values() if len(boxes)]
    chunks = sum(-(-n // 32) for n in prompted)
    once = len(prompted) * max(encode, _LEAST_SECONDS) + chunks * decode
    blank = encode + chunks * decode
    seconds = {"evaluate_fp": once + _COMPILE_SECONDS["evaluate"]}
    if options.method != FLOAT:
        if inputs.saved is None:
            images = len(inputs.calib)
            reconstruction = options.reconstruction_config()
            seconds["quantize"] = (
                _COMPILE_SECONDS["quantize"]
                + images * _CALIBRATION_PASSES * max(encode, _LEAST_SECONDS)
                + (inputs.parameter_count * _WEIGHT_SEARCH if options.quant_config().weight_search else 0.0)
            )
            if reconstruction is not None:
                steps = reconstruction.iterations * reconstruction.batch
                seconds["quantize"] += steps * _STEP_PASSES * max(encode, _LEAST_SECONDS)
        seconds["evaluate_quantized"] = _QUANTIZED_PASSES * once + _COMPILE_SECONDS["evaluate"]
    if options.blank:
        seconds["evaluate_blank"] = blank * (1 + _QUANTIZED_PASSES * (options.method != FLOAT))
    return Forecast(seconds, _memory(inputs, options), speed)


def _seconds_of_passes(sam: Sam, speed: float) -> tuple[float, float]:
    """Seconds of an image through the encoder, and of up to 32 prompts through the decoder."""
    layers = count(sam.config, prompts=32).layers
    encoder, decoder = (
        sum(layer.ops.macs for layer in layers if layer.part == part) for part in ("encoder", "decoder")
    )
    return encoder / (speed * _REACHED), decoder / (speed * _REACHED)


def _memory(inputs: Inputs, options: Options) -> int:
    weights = 4 * inputs.parameter_count
    if options.method == FLOAT:
        return _PROCESS + 2 * weights + _MAP_CHUNK
    reconstruction = options.reconstruction_config() if inputs.saved is None else None
    kept = 0
    if reconstruction is not None:
        config = inputs.sam.config
        # Inputs of the floating-point and of the quantized model, and outputs, of one unit on all images.
        activations = 3 * len(inputs.calib) * config.grid**2 * config.embed_dim * 4
        kept = min(activations, reconstruction.memory_budget)
    return _PROCESS + _SEARCHES + 3 * weights + _MAP_CHUNK + kept


def describe(inputs: Inputs, options: Options, found: Forecast, finished: Sequence[str] = ()) -> str:
    """The plan of a run as lines for a terminal.

    Args:
        finished: what earlier runs left that this one would go on from.
    """
    megabytes = 4 * inputs.parameter_count / 1e6
    lines = [
        "plan; nothing was run or written:",
        f"  model        {options.model_name()}, {inputs.parameter_count:,} parameters, {megabytes:,.1f} MB in float32",
        f"  evaluation   {len(inputs.dataset.items)} images with {len(inputs.boxes)} boxes of {inputs.dataset.source}"
        + (", and blank ones" if options.blank else ""),
        f"  {options.protocol().describe().replace('protocol: ', 'protocol     ')}",
    ]
    if options.method != FLOAT:
        lines.append(f"  quantization {_quantization(inputs, options)}")
    lines += [f"  kept         {what}" for what in finished]
    lines += [f"  note         {note}" for note in inputs.notes(options)]
    lines.append(f"  {'stage':<20}{'about':>10}")
    lines += [f"  {name:<20}{in_words(value):>10}" for name, value in (*found.seconds.items(), ("all", found.total))]
    lines.append(f"  memory       about {found.memory / 2**30:.1f} GiB at the peak")
    lines.append(
        f"  (at {2 * found.speed / 1e9:,.0f} GFLOP/s in float32 products, as measured just now; times are right within "
        "a factor of two or three)"
    )
    return "\n".join(lines)


def _quantization(inputs: Inputs, options: Options) -> str:
    if inputs.saved is not None:
        config = inputs.saved.quant_config
        return f"none; {options.artefact} is W{config.w_bits}A{config.a_bits}"
    reconstruction = options.reconstruction_config()
    learned = "calibrated alone" if reconstruction is None else f"{reconstruction.iterations} iterations for each unit"
    return f"W{options.w_bits}A{options.a_bits} {options.method} on {len(inputs.calib)} images, {learned}"


def in_words(seconds: float) -> str:
    """A time as people say it: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
