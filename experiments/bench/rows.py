"""The work that `experiments.benchmark` times, and the fresh process in which each row of it runs.

A row is prepared once and then run as often as it is asked to; see `serve` for how a process is spoken to.
"""

import contextlib
import dataclasses
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp

from ahcptq_jax.architectures import module_of
from ahcptq_jax.calibration.statistics import draw_rows
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import Hybrid, searches
from ahcptq_jax.quantizers.searches import grouping
from experiments.bench import learning, peers
from experiments.bench.made_up import random_quantized
from experiments.job.allocator import keep_pages
from experiments.mini.models import MODELS
from sam_flax import SamModel
from sam_flax.config import MINI, VIT_B, VIT_H, VIT_L, SamConfig, SegmenterConfig
from sam_flax.encoders.hiera import SAM2_TINY
from sam_flax.encoders.tiny_vit import MOBILE_SAM
from sam_flax.errors import InputError

try:
    from ahcptq_jax.formats.onnx import export_onnx
except InputError:  # an extra, which the other rows do not need
    export_onnx = None  # type: ignore[assignment]

BITS = 4
CEILING_SIDE = 2048


@dataclasses.dataclass(frozen=True)
class Work:
    """One row, ready to run.

    Attributes:
        run: does the work and returns its result, which may still be under way.
        parts: what `run` does at once; the row's seconds are those of one part.
        flops: floating-point operations of its matrix products, where their rate is of interest.
    """

    run: Callable[[], Any]
    parts: int = 1
    flops: float | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """What is timed.

    Attributes:
        name: as `--rows` takes it.
        what: in words.
        prepare: makes the work; its argument asks for toy sizes, at which times mean nothing.
        peers: the same by others, where there is such code: name -> what makes it. The first word of a name is what
            `--against` calls it.
        beside: another row of ours that is run turn by turn with this one, for the ratio of their times; "" for none.
    """

    name: str
    what: str
    prepare: Callable[[bool], Work]
    peers: Mapping[str, Callable[[bool], Work]] = dataclasses.field(default_factory=dict)
    beside: str = ""


# --- The image encoder ------------------------------------------------------------------------------------------------


def encoder_flops(config: SamConfig) -> float:
    """Floating-point operations (two per multiply-add) of the encoder's matrix products on one image.

    Linear layers count their tokens without padding; attention counts windows whole, as padding takes part in it.
    """
    tokens, width = config.grid**2, config.embed_dim
    total = tokens * width * 3 * config.patch_size**2
    for index in range(config.depth):
        window = config.block_window(index)
        side = window or config.grid
        queries = (-(-config.grid // side) * side) ** 2
        total += tokens * width * (4 * width + 2 * int(width * config.mlp_ratio))
        total += queries * width * (2 * side**2 + 2 * side)  # scores, values, two relative positions
    total += tokens * config.out_chans * (width + 9 * config.out_chans)
    return 2.0 * total


def _toy(config: Any) -> Any:
    """A small encoder of the same family; of SAM's, one block in windows and one global."""
    if not isinstance(config, SamConfig):
        return next(sam.config for sam in MODELS.values() if sam.config.family == config.family)
    toy = dataclasses.replace(MINI, img_size=64, depth=2, window_size=5, global_attn_indexes=(1,))
    return dataclasses.replace(toy, mlp_ratio=config.mlp_ratio)


def _model(config: SegmenterConfig, bits: int | None) -> Any:
    """A model of random weights, in floating point or quantized."""
    sam = module_of(config)
    params = sam.init_params(jax.random.key(0))
    if bits is None:
        return SamModel(sam, params)
    return random_quantized(config, params, QuantConfig(w_bits=bits, a_bits=bits))


def _image(config: SegmenterConfig) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (1, config.img_size, config.img_size, 3))


def _encoder(config: SegmenterConfig, bits: int | None = None) -> Callable[[bool], Work]:
    def prepare(toy: bool) -> Work:
        chosen = _toy(config) if toy else config
        model, images = _model(chosen, bits), _image(chosen)
        flops = encoder_flops(chosen) if isinstance(chosen, SamConfig) else None
        return Work(lambda: model.encode_image(images), flops=flops)

    return prepare


def _answer(config: SegmenterConfig, bits: int | None = None) -> Callable[[bool], Work]:
    """The masks of eight boxes on one image."""

    def prepare(toy: bool) -> Work:
        chosen = _toy(config) if toy else config
        model, images = _model(chosen, bits), _image(chosen)
        boxes = jnp.tile(jnp.array([[0.1, 0.2, 0.6, 0.7]]) * chosen.img_size, (8, 1))
        return Work(lambda: model.decode(model.encode_image(images), None, boxes, None, False))

    return prepare


def _torch_encoder(config: SamConfig, fused: bool = False) -> Callable[[bool], Work]:
    def prepare(toy: bool) -> Work:
        return Work(peers.encoder(_toy(config) if toy else config, fused))

    return prepare


def _runtimes(config: SamConfig) -> dict[str, Callable[[bool], Work]]:
    """The public encoder, exported to ONNX, in other runtimes."""

    def prepare(toy: bool, run: Callable[[SamConfig], Callable[[], Any]]) -> Work:
        return Work(run(_toy(config) if toy else config))

    return {name: partial(prepare, run=run) for name, run in peers.RUNTIMES.items()}


def _onnx_encoder(config: SegmenterConfig, bits: int | None, vnni: bool = False) -> Callable[[bool], Work]:
    """Our own export in ONNX Runtime, at so many bits, or in floating point; `vnni` as `export_onnx` takes it."""

    def prepare(toy: bool) -> Work:
        if export_onnx is None:
            raise InputError("Rows of ONNX files need the extra onnx; install it with pip install 'ahcptq-jax[onnx]'.")
        chosen = _toy(config) if toy else config
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(_model(chosen, bits), folder, vnni=vnni)
            return Work(peers.onnxruntime_run(Path(folder) / "encoder.onnx", chosen.img_size))

    return prepare


# --- Searches and quantizers ------------------------------------------------------------------------------------------


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _hluq_search(drawn: int | None) -> Callable[[bool], Work]:
    def prepare(toy: bool) -> Work:
        rows, width, out = (64, 32, 16) if toy else (4096, 3072, 768)
        x, weight = jax.nn.gelu(_normal(0, rows, width)), _normal(1, width, out) / width**0.5
        candidates = searches.hybrid_candidates(BITS)
        before = searches.range_init()
        picked = None if drawn is None else draw_rows(rows, min(drawn, rows // 2), jax.random.key(2))
        return Work(lambda: searches.hybrid_of_batch(before, x, weight, candidates, BITS, picked=picked))

    return prepare


def _weight_search(width: int, out: int) -> Callable[[bool], Work]:
    def prepare(toy: bool) -> Work:
        weight = _normal(0, *((16, 8) if toy else (width, out)))
        return Work(lambda: searches.search_weight(weight, BITS))

    return prepare


def _softmax_search(toy: bool) -> Work:
    heads, tokens, width = (2, 32, 8) if toy else (12, 1024, 64)
    attention = jax.nn.softmax(3 * _normal(0, heads, tokens, tokens))
    value = _normal(1, heads, tokens, width)
    state = searches.softmax_init()
    return Work(lambda: searches.softmax_update(state, attention, value, 2**BITS - 1))


def _hluq_forward(toy: bool) -> Work:
    x = jax.nn.gelu(_normal(0, *((64, 32) if toy else (4096, 3072))))
    minimum, maximum = jnp.min(x), jnp.max(x)
    quantizer = Hybrid.from_range(minimum, maximum - minimum, 0.3, 0.25, BITS)
    forward = jax.jit(Hybrid.fake_quant)
    return Work(lambda: forward(quantizer, x))


def _cag_ladder(toy: bool) -> Work:
    # SAM-B has two grouped inputs of its width in each of its 12 encoder blocks.
    layers, channels = (2, 64) if toy else (24, 768)
    scale = jnp.exp(0.5 * _normal(0, layers, channels)) * 0.1
    zero_point = jnp.round(jnp.clip(7.5 + 2 * _normal(1, layers, channels), 0, 15))
    return Work(lambda: grouping.ladder(scale, zero_point, 4), parts=layers)


def _matmul(toy: bool) -> Work:
    side = 64 if toy else CEILING_SIDE
    a, b = _normal(0, side, side), _normal(1, side, side)
    product = jax.jit(lambda a, b: jnp.matmul(a, b))
    return Work(lambda: product(a, b), flops=2.0 * side**3)


def _mlp_step(learn: bool) -> Callable[[bool], Work]:
    def prepare(toy: bool) -> Work:
        sizes = (16, 32, 4) if toy else (768, 3072, 64)
        return Work(learning.mlp_step(*sizes) if learn else learning.float_mlp_step(*sizes))

    return prepare


def _block_pair(toy: bool) -> Work:
    return Work(learning.block_pair_step(_toy(VIT_B) if toy else VIT_B, images=2 if toy else 32))


ROWS = (
    Row("matmul", "float32 product, 2048x2048 by 2048x2048", _matmul),
    Row(
        "encoder_b",
        "SAM-B image encoder, 1x1024x1024",
        _encoder(VIT_B),
        {"torch": _torch_encoder(VIT_B), **_runtimes(VIT_B)},
    ),
    Row(
        "encoder_b_fused",
        "the same, against the public encoder rewritten on PyTorch's fused attention",
        _encoder(VIT_B),
        {"torch": _torch_encoder(VIT_B, fused=True)},
    ),
    Row("encoder_b_w4a4", "the same at W4A4: int8 levels", _encoder(VIT_B, 4), beside="encoder_b"),
    Row("encoder_b_w8a8", "the same at W8A8", _encoder(VIT_B, 8), beside="encoder_b"),
    Row("encoder_l", "SAM-L image encoder, 1x1024x1024", _encoder(VIT_L), {"torch": _torch_encoder(VIT_L)}),
    Row("encoder_h", "SAM-H image encoder, 1x1024x1024", _encoder(VIT_H), {"torch": _torch_encoder(VIT_H)}),
    Row("encoder_mobile_sam", "MobileSAM image encoder, 1x1024x1024", _encoder(MOBILE_SAM)),
    Row("encoder_mobile_sam_w4a4", "the same at W4A4", _encoder(MOBILE_SAM, 4), beside="encoder_mobile_sam"),
    Row("encoder_sam2_tiny", "SAM 2.1 tiny image encoder, 1x1024x1024", _encoder(SAM2_TINY)),
    Row("encoder_sam2_tiny_w4a4", "the same at W4A4", _encoder(SAM2_TINY, 4), beside="encoder_sam2_tiny"),
    Row("image_mini", "MINI, an image with 8 boxes", _answer(MINI)),
    Row("image_mini_w4a4", "the same at W4A4", _answer(MINI, 4), beside="image_mini"),
    Row("onnx_b", "SAM-B image encoder, our ONNX file in ONNX Runtime", _onnx_encoder(VIT_B, None), _runtimes(VIT_B)),
    Row("onnx_b_w4a4", "the same at W4A4", _onnx_encoder(VIT_B, 4), _runtimes(VIT_B)),
    Row("onnx_b_w8a8", "the same at W8A8", _onnx_encoder(VIT_B, 8), _runtimes(VIT_B)),
    Row("onnx_sam2_tiny", "SAM 2.1 tiny image encoder, our ONNX file in ONNX Runtime", _onnx_encoder(SAM2_TINY, None)),
    Row("onnx_sam2_tiny_w4a4", "the same at W4A4", _onnx_encoder(SAM2_TINY, 4), beside="onnx_sam2_tiny"),
    Row("onnx_b_w8a8_vnni", "the same for processors with VNNI", _onnx_encoder(VIT_B, 8, True), _runtimes(VIT_B)),
    Row(
        "hluq_search",
        "HLUQ search, one batch, 4096x3072 -> 768, 9 candidates, 2048 rows drawn as in calibration",
        _hluq_search(QuantConfig.hluq_rows),
    ),
    Row("hluq_search_all", "the same, of all rows (--hluq_rows=0)", _hluq_search(None)),
    Row("weight_search_3072", "weight range search, 4 bits, 768 -> 3072", _weight_search(768, 3072)),
    Row("weight_search_768", "weight range search, 4 bits, 768 -> 768", _weight_search(768, 768)),
    Row("softmax_search", "softmax search, 12x1024x1024 attention, values 64 wide", _softmax_search),
    Row("hluq_forward", "HLUQ fake-quant forward, 4096x3072", _hluq_forward),
    Row("mlp_step", "reconstruction step, MLP 768-3072-768, 4096 tokens", _mlp_step(learn=True)),
    Row("mlp_float_step", "gradient step of the same MLP in floating point", _mlp_step(learn=False)),
    Row("block_pair", "a step of each part of a windowed and a global block, SAM-B, 32 images", _block_pair),
    Row("cag_ladder", "CAG ladder 32-16-8-4, 768 channels, per layer of 24 at once", _cag_ladder),
)


# --- The process of a row ---------------------------------------------------------------------------------------------


class CompileClock:
    """Seconds during which JAX traced, lowered or compiled; spans within spans count once."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        del kwargs
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            self.spans.append((now - duration_secs, now))

    def seconds(self) -> float:
        total, reached = 0.0, -float("inf")
        for start, end in sorted(self.spans):
            total += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return total


def peak_bytes() -> int:
    """The most memory that this process has held (resident set)."""
    try:
        # Not getrusage where it can be helped: on Linux a child inherits the number of the process that started it.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def timed(run: Callable[[], Any]) -> dict[str, float]:
    """Wall seconds of one run, and processor seconds of all its threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def serve(name: str, peer: str, toy: bool, requests: TextIO, answers: TextIO) -> None:
    """Prepares a row, runs it once, and then once for every line of `requests`.

    Answers in JSON lines: `compile_seconds` of the first run; `seconds cpu_seconds` of each other, with
    `ceiling_gflops` measured right after it if the row counts its products; at the end `peak_bytes parts flops`.
    """

    def answer(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=answers, flush=True)

    row = next(row for row in ROWS if row.name == name)
    # What compiling costs is part of the table.
    jax.config.update("jax_enable_compilation_cache", False)
    with contextlib.redirect_stdout(sys.stderr):  # exporters print
        work = (row.peers[peer] if peer else row.prepare)(toy)
    clock = CompileClock()
    timed(work.run)
    answer({"compile_seconds": clock.seconds()})
    ceiling = _matmul(toy) if work.flops else None
    if ceiling:
        timed(ceiling.run)
    for _ in requests:
        values = timed(work.run)
        if ceiling and ceiling.flops:
            seconds = statistics.median(timed(ceiling.run)["seconds"] for _ in range(5))
            values["ceiling_gflops"] = ceiling.flops / seconds / 1e9
        answer(values)
    answer({"peak_bytes": peak_bytes(), "parts": work.parts, "flops": work.flops})


if __name__ == "__main__":
    _, chosen_name, chosen_peer, size = sys.argv
    if chosen_peer == "ours":
        # As the command line does.
        keep_pages()
    serve(chosen_name, "" if chosen_peer == "ours" else chosen_peer, size == "toy", sys.stdin, sys.stdout)
