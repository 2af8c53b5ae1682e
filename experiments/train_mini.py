"""Trains MINI, the small SAM that ships.

Three phases, because a box prompt alone already predicts a blob and lets a network ignore the image:
`pretrain` teaches encoder and upscaling to tell objects apart densely, `warm` teaches the decoder on frozen
features, `joint` trains everything. Run it again with the same flags to go on after an interruption.

    python -m experiments.train_mini --out=runs/mini

Writes to `--out`: `state.npz` (to resume), `curve.jsonl` (losses and held-out IoU), `mini.safetensors`.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from tqdm import tqdm

from experiments.mini.data import BatchSettings, Mixture, Photograph, load_photographs, make_batch, prefetch, scene_pool
from experiments.mini.losses import Batch, LossWeights, auxiliary_head, joint_loss, normalise, pretrain_loss
from experiments.scenes.scenes import EVAL_SEED, make_scene
from sam_flax.config import MINI, SamConfig
from sam_flax.files.checkpoint import save_params
from sam_flax.sam import Params, Sam, call

# Validation scenes of the curve; kept apart from the first EVAL_SEED scenes, which the product is judged on.
CURVE_SCENES_START = 100_000
CURVE_SCENES = 48
# Step of the joint phase -> what images it sees from there on. Scenes teach to look; photographs come in small doses,
# since a hundred of them are soon known by heart.
MIXTURES = (
    (0, Mixture(photo_share=0.2)),
    (2400, Mixture(photo_share=0.4, mosaic_share=0.2, min_photo_area=0.0004)),
    (4100, Mixture(photo_share=0.12, mosaic_share=0.1, min_photo_area=0.0004)),
    (9600, Mixture()),
)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Lengths in steps and peak learning rates."""

    pretrain_steps: int = 700
    warm_steps: int = 200
    joint_steps: int = 10600
    encoder_rate: float = 6e-4
    decoder_rate: float = 9e-4
    pretrain_rate: float = 1e-3
    anneal_share: float = 0.3  # last part of the joint phase, linear to zero
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.998

    @property
    def joint_start(self) -> int:
        return self.pretrain_steps + self.warm_steps

    @property
    def total(self) -> int:
        return self.joint_start + self.joint_steps

    def phase(self, step: int) -> str:
        if step < self.pretrain_steps:
            return "pretrain"
        return "warm" if step < self.joint_start else "joint"

    def encoder_rate_at(self, step: jax.Array) -> jax.Array:
        joint = self._joint_rate(step, self.encoder_rate)
        early = jnp.where(step < self.pretrain_steps, self._ramp(step) * self.pretrain_rate, 0.0)
        return jnp.where(step < self.joint_start, early, joint)

    def decoder_rate_at(self, step: jax.Array) -> jax.Array:
        joint = self._joint_rate(step, self.decoder_rate)
        return jnp.where(step < self.joint_start, self._ramp(step) * self.pretrain_rate, joint)

    def _ramp(self, step: jax.Array) -> jax.Array:
        return jnp.minimum(1.0, (step + 1) / 50)

    def _joint_rate(self, step: jax.Array, peak: float) -> jax.Array:
        left = (self.total - step) / max(1.0, self.anneal_share * self.joint_steps)
        return peak * self._ramp(step - self.joint_start) * jnp.clip(left, 0.0, 1.0)


class TrainState(NamedTuple):
    step: jax.Array
    params: Params
    ema: Params
    optimizer: optax.OptState


def init_params(sam: Sam, seed: int) -> Params:
    """Random parameters with the starts that make a small SAM learn at once.

    The Fourier matrix has moderate frequencies, the first self-attention (which has no residual) is near the
    identity, and the patch embedding is a rotated cosine basis.
    """
    key = jax.random.key(seed)
    params = sam.init_params(key)
    rng = np.random.default_rng(seed)
    config = sam.config
    c = config.out_chans

    angle = rng.uniform(0, 2 * np.pi, c // 2)
    radius = np.exp(rng.uniform(np.log(0.125), np.log(3.0), c // 2))
    matrix = np.stack([np.cos(angle), np.sin(angle)]) * radius
    params["prompt_encoder"]["pe_layer"]["positional_encoding_gaussian_matrix"] = matrix.astype(np.float32)

    first = params["mask_decoder"]["transformer"]["layers_0"]["self_attn"]
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        first[name]["kernel"] = np.eye(c, dtype=np.float32) + 0.02 * np.asarray(first[name]["kernel"])

    params["image_encoder"]["patch_embed"]["proj"]["kernel"] = cosine_patches(rng, config)
    params["auxiliary"] = auxiliary_head(c).init(jax.random.fold_in(key, 1), jnp.zeros((1, c)))["params"]
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)


def cosine_patches(rng: np.random.Generator, config: SamConfig) -> np.ndarray:
    """The lowest-frequency 2-D cosines of each colour, randomly rotated: (p, p, 3, D)."""
    p, d = config.patch_size, config.embed_dim
    k = np.arange(p)
    basis = np.cos(np.pi * (k[None, :] + 0.5) * k[:, None] / p)  # [frequency, pixel]
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    order = sorted((i + j, i, j) for i in range(p) for j in range(p))
    waves = [np.outer(basis[i], basis[j]) for _, i, j in order][: -(-d // 3)]
    filters = np.stack([wave[:, :, None] * np.eye(3)[colour] for wave in waves for colour in range(3)])[:d]
    rotation, _ = np.linalg.qr(rng.normal(size=(len(filters), d)).T)
    # The mean of a patch has about p times the amplitude of its details; a quarter keeps tokens near unit size.
    return (0.25 * np.tensordot(filters, rotation.T, axes=(0, 0))).astype(np.float32)


def make_optimizer(schedule: Schedule) -> optax.GradientTransformation:
    """AdamW with a rate for the image encoder and one for the rest; kernels alone decay."""

    def adamw(rate: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformation:
        return optax.adamw(
            rate,
            b1=0.9,
            b2=0.98,
            weight_decay=schedule.weight_decay,
            mask=_is_kernel,  # type: ignore[arg-type]
        )

    groups = {"encoder": adamw(schedule.encoder_rate_at), "decoder": adamw(schedule.decoder_rate_at)}

    def label(params: Params) -> Params:
        return {
            k: jax.tree.map(lambda _: "encoder" if k == "image_encoder" else "decoder", v)  # noqa: B023
            for k, v in params.items()
        }

    frozen_pe = optax.masked(optax.set_to_zero(), _is_fourier_matrix)
    return optax.chain(optax.clip_by_global_norm(schedule.clip), optax.multi_transform(groups, label), frozen_pe)


def _is_kernel(params: Params) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def _is_fourier_matrix(params: Params) -> Params:
    # A buffer in SAM, not a parameter.
    name = "positional_encoding_gaussian_matrix"
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == name, params)


def make_step(sam: Sam, schedule: Schedule, phase: str) -> Callable[[TrainState, Batch], tuple[TrainState, Any]]:
    """One jitted optimisation step of a phase."""
    optimizer = make_optimizer(schedule)

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        if phase == "pretrain":
            return pretrain_loss(sam, params, batch)
        return joint_loss(sam, params, batch, LossWeights(), freeze_encoder=phase == "warm")

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, metrics = jax.grad(loss, has_aux=True)(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # The average follows closely at first, so that early evaluations mean something.
        decay = jnp.minimum(schedule.ema, (1 + state.step) / (20 + state.step))
        ema = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state.ema, params)
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return step


def save_state(path: Path, state: TrainState, fingerprint: str) -> None:
    """Writes the state atomically."""
    leaves: dict[str, Any] = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    partial_path = path.with_suffix(".partial")
    with partial_path.open("wb") as file:
        np.savez(file, fingerprint=np.array(fingerprint), **leaves)
    os.replace(partial_path, path)


def load_state(path: Path, like: TrainState, fingerprint: str) -> TrainState:
    """Reads a state written by `save_state`.

    Raises:
        ValueError: if the file is corrupt or was written by a run with other flags.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = str(archive["fingerprint"])
            leaves, treedef = jax.tree.flatten(like)
            loaded = [archive[f"leaf_{i}"] for i in range(len(leaves))]
    except Exception as error:
        raise ValueError(f"{path} is not a readable training state ({error}); delete it to start over.") from error
    if found != fingerprint:
        raise ValueError(f"{path} belongs to a run with other flags ({found}); use another --out or delete it.")
    return jax.tree.unflatten(treedef, [jnp.asarray(a, b.dtype) for a, b in zip(loaded, leaves, strict=True)])


def make_curve_eval(sam: Sam) -> Callable[[Params], dict[str, float]]:
    """Mean IoU at mask resolution on held-out scenes: box prompts, the same on blank images, and one point."""
    size, m = sam.config.img_size, sam.config.mask_size

    @jax.jit
    def predict(params: Params, image: jax.Array, boxes: jax.Array, points: jax.Array, target: jax.Array):
        def iou(image: jax.Array, prompt: dict[str, Any], multimask: bool) -> jax.Array:
            embedding = call(sam, params, normalise(sam, image[None]), method="encode_image")
            logits, _ = call(sam, params, embedding, **prompt, multimask_output=multimask, method="decode")
            a, b = logits > 0, target[:, None]
            return ((a & b).sum((-2, -1)) / jnp.maximum((a | b).sum((-2, -1)), 1)).max(-1)

        blank = jnp.full_like(image, 124)
        point = (points[:, None], jnp.ones((len(points), 1), jnp.int32))
        return (
            iou(image, {"boxes": boxes}, False),
            iou(blank, {"boxes": boxes}, False),
            iou(image, {"points": point}, True),
        )

    prepared = []
    for i in range(CURVE_SCENES):
        scene = make_scene(EVAL_SEED, CURVE_SCENES_START + i, size)
        n = len(scene.masks)
        rows = np.resize(np.arange(n), 8)  # one static shape
        points = np.stack([_deep_point(mask) for mask in scene.masks])
        target = scene.masks.reshape(n, m, size // m, m, size // m).mean((2, 4)) > 0.5
        prepared.append((scene.image, scene.boxes[rows], points[rows], target[rows], n))

    def evaluate(params: Params) -> dict[str, float]:
        sums, count = np.zeros(3), 0
        for image, boxes, points, target, n in prepared:
            sums += [float(v[:n].sum()) for v in map(np.asarray, predict(params, image, boxes, points, target))]
            count += n
        names = ("val_box_mIoU", "val_blank_mIoU", "val_point_mIoU")
        return {name: round(v, 4) for name, v in zip(names, (sums / count).tolist(), strict=True)}

    return evaluate


def _deep_point(mask: np.ndarray) -> np.ndarray:
    depth = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return np.array([x, y], np.float32)


def train(
    out: Path,
    config: SamConfig,
    schedule: Schedule,
    settings: BatchSettings,
    mixtures: Sequence[tuple[int, Mixture]],
    seed: int,
    scenes: int,
    cache: Path,
    photographs: list[Photograph],
    save_minutes: float = 4.0,
    eval_every: int = 500,
) -> Params:
    """Trains (or resumes) and returns the averaged parameters."""
    out.mkdir(parents=True, exist_ok=True)
    sam = Sam(config)
    # The length of the last phase may change on resuming: it shapes the remaining steps only.
    past = {k: v for k, v in dataclasses.asdict(schedule).items() if k != "joint_steps"}
    images = [(start, dataclasses.asdict(mixture)) for start, mixture in mixtures]
    fingerprint = json.dumps([config.to_dict(), past, dataclasses.asdict(settings), images, seed])
    params = init_params(sam, seed)
    state = TrainState(
        jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), make_optimizer(schedule).init(params)
    )
    state_path = out / "state.npz"
    if state_path.exists():
        state = load_state(state_path, state, fingerprint)
    pool = scene_pool(cache, scenes, config.img_size)

    def make(step: int) -> Batch:
        begun = [mixture for start, mixture in mixtures if step >= schedule.joint_start + start]
        return make_batch(step, seed, config, settings, begun[-1] if begun else Mixture(), pool, photographs)

    evaluate = make_curve_eval(sam)
    steps: dict[str, Callable] = {}
    start = int(state.step)
    with (out / "curve.jsonl").open("a") as file:
        file.write(json.dumps({"start": start, "joint_steps": schedule.joint_steps, "scenes": scenes}) + "\n")
    saved = time.monotonic()
    progress = tqdm(total=schedule.total, initial=start, desc="train", mininterval=2)
    recent: list[dict[str, jax.Array]] = []
    for step, batch in prefetch(make, start, schedule.total):
        phase = schedule.phase(step)
        if phase not in steps:
            steps[phase] = make_step(sam, schedule, phase)
        state, metrics = steps[phase](state, batch)
        recent.append(metrics)
        progress.update()
        done = step + 1
        if done % eval_every == 0 or done == schedule.total:
            names = recent[-1].keys()
            means = {k: float(np.mean([float(r[k]) for r in recent if k in r])) for k in names}
            row = {"step": done, "phase": phase, **{k: round(v, 4) for k, v in means.items()}}
            row |= evaluate(state.ema)
            recent = []
            with (out / "curve.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            progress.write(json.dumps(row))
        if done == schedule.total or time.monotonic() - saved > 60 * save_minutes:
            save_state(state_path, state, fingerprint)
            export(out / "mini.safetensors", config, state.ema)
            saved = time.monotonic()
    return state.ema


def export(path: Path, config: SamConfig, params: Params) -> None:
    """Saves the model without its training heads."""
    save_params(path, config, {k: v for k, v in params.items() if k != "auxiliary"})


FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is an unexpected argument; every option is a --flag.")
    photographs: list[Photograph] = []
    if FLAGS.photo_images:
        photographs = load_photographs(Path(FLAGS.photo_images), Path(FLAGS.photo_segments), 2 * MINI.img_size)
    train(
        Path(FLAGS.out),
        MINI,
        Schedule(
            pretrain_steps=FLAGS.pretrain_steps,
            warm_steps=FLAGS.warm_steps,
            joint_steps=FLAGS.joint_steps,
        ),
        BatchSettings(),
        MIXTURES,
        FLAGS.seed,
        FLAGS.scenes,
        Path(FLAGS.cache or Path(FLAGS.out) / "cache"),
        photographs,
    )


if __name__ == "__main__":
    flags.DEFINE_string("out", "runs/mini", "Folder for the state, the curve and the weights.")
    flags.DEFINE_string("cache", "", "Folder of the generated scenes; default: <out>/cache.")
    flags.DEFINE_integer("seed", 0, "Seed of the initial weights and of the batches.")
    flags.DEFINE_integer("scenes", 16000, "Generated training scenes.")
    flags.DEFINE_integer("pretrain_steps", 700, "Steps of dense encoder training.")
    flags.DEFINE_integer("warm_steps", 200, "Steps of the decoder on frozen features.")
    flags.DEFINE_integer("joint_steps", 10600, "Steps of joint training.")
    flags.DEFINE_string("photo_images", "", "Optional COCO image folder mixed into the batches, see MIXTURES.")
    flags.DEFINE_string("photo_segments", "", "Its annotation JSON (instances or panoptic-style segments).")
    app.run(main)
