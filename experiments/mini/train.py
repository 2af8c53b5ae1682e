"""The training loop: phases, curve, states, weights."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.mini.atlas import CURVE_SCENE, HELD, Atlas, cumulative_weights, uniform_weights
from experiments.mini.augment import BatchSettings
from experiments.mini.curve import make_curve
from experiments.mini.losses import LossWeights
from experiments.mini.schedule import Schedule, Step, make_step, start_state
from experiments.mini.start import init_params, with_auxiliary
from experiments.mini.state import load_state, save_state
from experiments.mini.teacher import Teacher, with_heads_of
from sam_flax.config import SegmenterConfig
from sam_flax.files.checkpoint import save_params
from sam_flax.sam import Params
from sam_flax.segmenter import Segmenter


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """How one run goes on, apart from what it trains.

    Attributes:
        seed: of the initial weights and of the batches.
        scene_share: images that are generated scenes.
        source_weights: of photographs, by source; 1 where none is given.
        precision: of the forward pass.
        log_every: steps between lines of the curve.
        eval_every: steps between its scores; 0: none.
        eval_batches: batches that these are taken on.
        save_minutes: between saved states.
        minutes: of the whole command, compiling included: the length of the joint phase follows from the speed of its
            steps; 0: by its steps.
        losses: weights of the losses.
    """

    seed: int = 0
    scene_share: float = 0.25
    source_weights: tuple[tuple[str, float], ...] = ()
    precision: str = "bfloat16"
    losses: LossWeights = LossWeights()
    log_every: int = 100
    eval_every: int = 1000
    eval_batches: int = 3
    save_minutes: float = 1.0
    minutes: float = 0.0


def train(
    out: Path,
    sam: Segmenter,
    schedule: Schedule,
    batches: BatchSettings,
    run: RunSettings,
    atlas: Atlas,
    sources: tuple[str, ...],
    start: Params | None = None,
    teacher: Teacher | None = None,
) -> Params:
    """Trains (or resumes) and returns the averaged parameters.

    Args:
        out: folder of `state.npz`, `curve.jsonl` and `mini.safetensors`.
        sam: the model.
        schedule: its phases.
        batches: what a batch is.
        run: the rest.
        atlas: the images.
        sources: where each of them comes from.
        start: weights to start from instead of random ones, without training heads.
        teacher: a model whose embeddings the encoder learns to make, of the same shape; without `start`, its heads are
            what the training starts from.

    Raises:
        InputError: if the state in `out` is damaged, or of a run with other settings.
    """
    begun = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    config = sam.config
    params = init_params(sam, run.seed) if start is None else with_auxiliary(start, config, run.seed)
    if start is None and teacher is not None:
        params = with_heads_of(params, teacher.params)
    state = start_state(params, schedule)
    fingerprint = _fingerprint(config, schedule, batches, run, start, teacher)
    state_path = out / "state.npz"
    if state_path.exists():
        state = load_state(state_path, state, fingerprint)
    cumulative = jnp.asarray(cumulative_weights(sources, dict(run.source_weights), run.scene_share))
    found = {"photo": uniform_weights(sources, HELD), "scene": uniform_weights(sources, CURVE_SCENE)}
    parts = {k: jnp.asarray(v) for k, v in found.items() if v is not None}
    precision = jnp.dtype(run.precision)
    evaluate = make_curve(sam, batches, precision)
    steps: dict[str, Step] = {}
    taught_by, taught = teacher or (None, None)
    key, total = jax.random.fold_in(jax.random.key(run.seed), 7), schedule.total
    log, clock = _Log(out / "curve.jsonl"), _Clock(schedule, run.minutes, begun)
    saved = time.monotonic()
    done = int(state.step)
    while done < total:
        phase = schedule.phase(done)
        # The decoder alone learns in the warm phase, by its rates: it shares the joint phase's compiled step.
        compiled = "pretrain" if phase == "pretrain" else "joint"
        if compiled not in steps:
            steps[compiled] = make_step(sam, schedule, batches, run.losses, compiled, precision, taught_by)
        state, metrics = steps[compiled](state, key, jnp.asarray(total), atlas, cumulative, taught)
        log.add(metrics)
        done += 1
        total = clock.total(done, total, metrics)
        last = done == total
        if done % run.log_every == 0 or last:
            if last or time.monotonic() - saved > 60 * run.save_minutes:
                save_state(state_path, state, fingerprint)
                export(out / "mini.safetensors", config, state.ema)
                saved = time.monotonic()
            scored = run.eval_every > 0 and (done % run.eval_every == 0 or last)
            log.write(done, phase, evaluate(state.ema, atlas, parts, run.eval_batches) if scored else {})
    return state.ema


class _Clock:
    """Sets the length of the joint phase by the mean time of its steps, where the command's minutes are given.

    A lent accelerator is taken away at a set time, however long compiling took, and a run that was not annealed is
    worth little: so the end is estimated anew at every `EVERY` steps.
    """

    FIRST, EVERY = 20, 200  # steps of the joint phase before the clock starts, and between its readings

    def __init__(self, schedule: Schedule, minutes: float, begun: float):
        self._start, self._minutes = schedule.joint_start, minutes
        self._end, self._since = begun + 60 * minutes, 0.0

    def total(self, done: int, total: int, metrics: dict[str, jax.Array]) -> int:
        """The number of steps of the whole run, after `done` of them."""
        joint = done - self._start
        if not self._minutes or joint < self.FIRST:
            return total
        if (joint - self.FIRST) % self.EVERY == 0:
            jax.block_until_ready(metrics)
            now = time.monotonic()
            if joint == self.FIRST:
                self._since = now
            else:  # scores and saved states are part of a step's mean time
                step_seconds = (now - self._since) / (joint - self.FIRST)
                total = done + max(1, int((self._end - now) / step_seconds))
        return total


class _Log:
    """Metrics of the steps since the last line, and the lines in a file."""

    def __init__(self, path: Path):
        self._path, self._begun = path, time.monotonic()
        self._recent: list[dict[str, jax.Array]] = []

    def add(self, metrics: dict[str, jax.Array]) -> None:
        self._recent.append(metrics)

    def write(self, step: int, phase: str, scores: dict[str, float]) -> None:
        # Metrics of another phase may lie among them, and steps without a point or a box.
        recent = jax.device_get(self._recent)
        names = recent[-1].keys()
        row: dict[str, Any] = {"step": step, "phase": phase, "seconds": round(time.monotonic() - self._begun, 1)}
        row |= {k: round(float(np.mean([r[k] for r in recent if k in r])), 4) for k in names}
        row |= scores
        self._recent = []
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def _fingerprint(
    config: SegmenterConfig,
    schedule: Schedule,
    batches: BatchSettings,
    run: RunSettings,
    start: Params | None,
    teacher: Teacher | None,
) -> str:
    # The length of the last phase may change on resuming: it shapes the remaining steps only.
    past = {k: v for k, v in dataclasses.asdict(schedule).items() if k != "joint_steps"}
    by = None if teacher is None else teacher.sam.config.to_dict()
    what = (run.seed, run.scene_share, run.source_weights, run.precision, run.losses, start is not None, by)
    return json.dumps([config.to_dict(), past, dataclasses.asdict(batches), what])


def export(path: Path, config: SegmenterConfig, params: Params) -> None:
    """Saves the model without its training heads, at half precision."""
    save_params(path, config, {k: v for k, v in params.items() if k != "auxiliary"}, "float16")
