"""Training of MINI: losses mean what they say, batches are reproducible, and a killed run ends where it would have."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import train_mini
from experiments.mini import data, losses
from experiments.scenes.scenes import TRAIN_SEED, make_scene
from sam_flax import SamConfig, load_params
from sam_flax.sam import Sam

TINY = SamConfig(
    img_size=64,
    patch_size=8,
    embed_dim=32,
    depth=2,
    num_heads=2,
    window_size=4,
    global_attn_indexes=(1,),
    out_chans=32,
    decoder_num_heads=4,
    decoder_mlp_dim=32,
    iou_head_hidden_dim=32,
)
SETTINGS = data.BatchSettings(batch=2, prompts=3)
SCENES = data.Mixture()
MIXTURES = ((0, SCENES), (1, data.Mixture(mosaic_share=0.5)))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> data.ScenePool:
    return data.scene_pool(tmp_path_factory.mktemp("cache"), 6, TINY.img_size)


@pytest.fixture(scope="module")
def batch(pool: data.ScenePool) -> losses.Batch:
    return data.make_batch(0, 0, TINY, SETTINGS, SCENES, pool, [])


@pytest.fixture(scope="module")
def params() -> dict:
    return train_mini.init_params(Sam(TINY), 0)


def test_pool_holds_the_scenes(pool: data.ScenePool) -> None:
    scene = make_scene(TRAIN_SEED, 3, TINY.img_size)
    np.testing.assert_array_equal(pool.images[3], scene.image)
    for i, mask in enumerate(scene.masks, 1):
        np.testing.assert_array_equal(pool.labels[3] == i, mask)


def test_batches_depend_on_seed_and_step_alone(pool: data.ScenePool, batch: losses.Batch) -> None:
    again = data.make_batch(0, 0, TINY, SETTINGS, SCENES, pool, [])
    other = data.make_batch(1, 0, TINY, SETTINGS, SCENES, pool, [])
    for a, b in zip(batch, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(not np.array_equal(a, b) for a, b in zip(batch, other, strict=True))


def test_prompts_fit_their_masks(batch: losses.Batch) -> None:
    cell = TINY.img_size / TINY.mask_size
    for i, j in np.argwhere(batch.weight > 0):
        x, y = (batch.points[i, j] / cell).astype(int)
        assert batch.masks[i, j, y, x] > 0, "a point prompt lies on its object"
        covered = np.argwhere(batch.masks[i, j] > 127)[:, ::-1] * cell
        x0, y0, x1, y1 = batch.boxes[i, j]
        slack = 0.2 * max(x1 - x0, y1 - y0) + 2 * cell
        assert (covered >= [x0 - slack, y0 - slack]).all() and (covered <= [x1 + slack, y1 + slack]).all()


def test_photographs_are_letterboxed_and_cropped(pool: data.ScenePool) -> None:
    image = np.zeros((90, 120, 3), np.uint8)
    image[20:60, 30:80] = 200
    segment = (image[..., 0] > 0).astype(np.uint8)[None]
    settings = data.BatchSettings(batch=8, prompts=1)
    photographs = data.Mixture(photo_share=1.0)
    made = data.make_batch(0, 0, TINY, settings, photographs, pool, [data.Photograph(image, segment)])
    bright = made.images.mean(-1) > 110
    for i in np.flatnonzero(made.weight[:, 0]):
        mask = np.kron(made.masks[i, 0] > 127, np.ones((2, 2), bool))
        padding = (made.images[i] == 116).all(-1)
        assert (bright[i] & ~padding & mask).sum() >= 0.8 * mask.sum(), "image and mask were cut alike"


def test_mosaics_hold_small_objects(pool: data.ScenePool) -> None:
    settings = data.BatchSettings(batch=4, prompts=3, exact_box_share=1.0)
    made = data.make_batch(0, 0, TINY, settings, data.Mixture(mosaic_share=1.0), pool, [])
    shown = made.boxes[made.weight > 0]
    assert len(shown) and (shown[:, 2:] - shown[:, :2]).max() <= TINY.img_size // 2


def test_perfect_logits_have_no_loss(batch: losses.Batch) -> None:
    target = jnp.asarray(batch.masks[0, :1] > 127, jnp.float32)
    good, bad = 20 * (target - 0.5), 20 * (0.5 - target)
    assert losses.dice_loss(good, target)[0] < 0.01 < losses.dice_loss(bad, target)[0]
    area = jnp.ones(1) * 100
    assert losses.focal_loss(good, target, area)[0] < 1e-3 < losses.focal_loss(bad, target, area)[0]
    np.testing.assert_array_equal(losses.mask_iou(good, target), 1.0)
    np.testing.assert_array_equal(losses.mask_iou(bad, target), 0.0)


def test_balanced_loss_weighs_object_and_background_alike() -> None:
    region = jnp.ones((8, 8))
    small = jnp.zeros((8, 8)).at[0, :4].set(1.0)
    everything_background = jnp.full((8, 8), -30.0)
    half_right = losses.balanced_bce(everything_background, small, region)
    # The background is right, the object wrong at 30 nats a cell, damped by the +1 in its count.
    np.testing.assert_allclose(half_right, 0.5 * 30 * 4 / 5, rtol=1e-4)


@pytest.mark.slow
def test_frozen_encoder_gets_no_gradient(params: dict, batch: losses.Batch) -> None:
    def loss(p: dict, freeze: bool) -> jax.Array:
        return losses.joint_loss(Sam(TINY), p, batch, losses.LossWeights(), freeze)[0]

    def norm(freeze: bool) -> float:
        grads = jax.grad(loss)(params, freeze)["image_encoder"]
        return float(sum(jnp.abs(g).sum() for g in jax.tree.leaves(grads)))

    assert norm(True) == 0.0 < norm(False)


def _train(out: Path, pool_dir: Path, **kwargs) -> dict:
    schedule = train_mini.Schedule(pretrain_steps=2, warm_steps=1, joint_steps=3)
    return train_mini.train(out, TINY, schedule, SETTINGS, MIXTURES, 0, 6, pool_dir, [], eval_every=100, **kwargs)


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_mini, "CURVE_SCENES", 2)
    whole = _train(tmp_path / "whole", tmp_path / "cache")
    real = train_mini.make_batch

    def killed_at_four(step: int, *args, **kwargs) -> losses.Batch:
        if step == 4:
            raise KeyboardInterrupt
        return real(step, *args, **kwargs)

    monkeypatch.setattr(train_mini, "make_batch", killed_at_four)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "parts", tmp_path / "cache", save_minutes=0)
    monkeypatch.setattr(train_mini, "make_batch", real)
    parts = _train(tmp_path / "parts", tmp_path / "cache")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)
    config, shipped = load_params(tmp_path / "parts" / "mini.safetensors")
    assert config == TINY and "auxiliary" not in shipped


def test_foreign_and_corrupt_states_are_refused(tmp_path: Path, params: dict) -> None:
    path = tmp_path / "state.npz"
    optimizer = train_mini.make_optimizer(train_mini.Schedule()).init(params)
    state = train_mini.TrainState(jnp.zeros((), jnp.int32), params, params, optimizer)
    train_mini.save_state(path, state, "one run")
    restored = train_mini.load_state(path, state, "one run")
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="other flags"):
        train_mini.load_state(path, state, "another run")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable training state"):
        train_mini.load_state(path, state, "one run")


def test_schedule_phases_and_rates() -> None:
    schedule = train_mini.Schedule(pretrain_steps=100, warm_steps=60, joint_steps=200)
    assert [schedule.phase(s) for s in (0, 99, 100, 159, 160)] == ["pretrain", "pretrain", "warm", "warm", "joint"]
    assert schedule.encoder_rate_at(jnp.array(120)) == 0.0, "the encoder rests while the decoder warms up"
    np.testing.assert_allclose(schedule.decoder_rate_at(jnp.array(290)), schedule.decoder_rate, rtol=1e-6)
    assert schedule.decoder_rate_at(jnp.array(schedule.total)) == 0.0


def test_missing_photographs_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; give a COCO image folder"):
        data.load_photographs(tmp_path / "none", tmp_path / "none.json", 64)
