"""Training of MINI: batches and losses mean what they say, and a killed run ends where it would have."""

import dataclasses
import json
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import train_mini
from experiments.coco.masks import encode
from experiments.mini import atlas as atlases
from experiments.mini import augment, folders, losses, schedule, shrink, start, state, train, views
from experiments.scenes.scenes import TRAIN_SEED, make_scene
from sam_flax import load_params
from sam_flax.sam import Sam
from tests.experiments.tiny import TINY

VIEWS = views.ViewSettings(canvas=64, prompts=4)
SETTINGS = augment.BatchSettings(batch=16, cells=TINY.mask_size, views=VIEWS)
SIDE = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photographs of 120 x 90 pixels, each with a bright rectangle and a dark disc as segments."""
    root = tmp_path_factory.mktemp("photos")
    (root / "images").mkdir()
    images, annotations = [], []
    for number in range(1, 5):
        noise = np.random.default_rng(number).integers(90, 130, (90, 120, 3), np.uint8)
        square, disc = np.zeros((90, 120), np.uint8), np.zeros((90, 120), np.uint8)
        square[15 : 40 + 5 * number, 10:50] = 1
        cv2.circle(disc, (85, 45), 15 + number, 1, -1)
        noise[square > 0], noise[disc > 0] = 230, 20
        cv2.imwrite(str(root / "images" / f"{number}.png"), noise)
        images.append({"id": number, "file_name": f"{number}.png", "width": 120, "height": 90, "source": "made"})
        for counts in encode(np.stack([square, disc]) > 0):
            rle = {"size": [90, 120], "counts": counts}
            annotations.append({"image_id": number, "segmentation": rle, "iscrowd": 0})
    (root / "segments.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return root


@pytest.fixture(scope="module")
def packed(folder: Path) -> tuple[atlases.Atlas, tuple[str, ...]]:
    records = [r for f in folders.find_folders(str(folder), "") for r in folders.list_records(f)]
    settings = atlases.AtlasSettings(side=SIDE, scenes=3, curve_scenes=2, scene_size=64, held_share=0.25)
    return atlases.build_atlas(records, [], settings, workers=1)


def weights_of(sources: tuple[str, ...], kind: str) -> jax.Array:
    found = atlases.uniform_weights(sources, kind)
    assert found is not None
    return jnp.asarray(found)


make = jax.jit(augment.make_batch, static_argnums=3)


@pytest.fixture(scope="module")
def batch(packed: tuple[atlases.Atlas, tuple[str, ...]]) -> augment.Batch:
    atlas, sources = packed
    cumulative = jnp.asarray(atlases.cumulative_weights(sources, {}, 0.3))
    return make(jax.random.key(0), atlas, cumulative, SETTINGS)


def test_atlas_holds_photographs_and_scenes(packed: tuple[atlases.Atlas, tuple[str, ...]]) -> None:
    atlas, sources = packed
    assert sorted(sources) == ["curve_scene"] * 2 + ["held/made"] + ["made"] * 3 + ["scene"] * 3
    scene = make_scene(TRAIN_SEED, 1, 64)
    index = sources.index("scene") + 1
    packed_pixels = np.asarray(atlas.pixels[index, : SIDE * SIDE]).reshape(SIDE, SIDE)[:64, :64]
    for channel in range(3):
        np.testing.assert_array_equal(packed_pixels >> (8 * channel) & 255, scene.image[..., channel])
    ys, xs = jnp.mgrid[:64, :64]
    for place, mask in enumerate(scene.masks):
        np.testing.assert_array_equal(augment.segment_at(atlas, atlas.first[index] + place, xs, ys), mask)
    assert not augment.segment_at(atlas, atlas.first[index], xs - 64, ys).any(), "nothing is outside"


def test_held_back_images_are_never_drawn(packed: tuple[atlases.Atlas, tuple[str, ...]]) -> None:
    atlas, sources = packed
    cumulative = atlases.cumulative_weights(sources, {"made": 2.0}, 0.3)
    drawn = np.bincount(views.draw_images(jax.random.key(1), jnp.asarray(cumulative), 4000), minlength=len(sources))
    share = {name: drawn[[s == name for s in sources]].sum() / 4000 for name in set(sources)}
    assert share["held/made"] == share["curve_scene"] == 0
    assert abs(share["scene"] - 0.3) < 0.03 and abs(share["made"] - 0.7) < 0.03


def test_batches_depend_on_their_key_alone(packed: tuple[atlases.Atlas, tuple[str, ...]], batch: augment.Batch) -> None:
    atlas, sources = packed
    cumulative = jnp.asarray(atlases.cumulative_weights(sources, {}, 0.3))
    again, other = (make(jax.random.key(k), atlas, cumulative, SETTINGS) for k in (0, 1))
    for a, b in zip(batch, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(not np.array_equal(a, b) for a, b in zip(batch, other, strict=True))


def test_boxes_and_points_fit_their_masks(batch: augment.Batch) -> None:
    cell = 64 / TINY.mask_size
    shown = np.argwhere(np.asarray(batch.weight) > 0)
    assert len(shown) > 40
    for i, j in shown:
        mask, (x0, y0, x1, y1) = np.asarray(batch.masks[i, j]), np.asarray(batch.true_boxes[i, j])
        ys, xs = np.nonzero(mask)
        assert abs(x0 - xs.min() * cell) <= cell and abs(x1 - (xs.max() + 1) * cell) <= cell
        assert abs(y0 - ys.min() * cell) <= cell and abs(y1 - (ys.max() + 1) * cell) <= cell
        x, y = (np.asarray(batch.points[i, j]) / cell).astype(int)
        assert mask[y, x] > 0, "a point prompt lies on its object"
        sides = np.maximum([x1 - x0, y1 - y0], 1.0)
        moved = np.abs(np.asarray(batch.boxes[i, j]) - [x0, y0, x1, y1]) / np.tile(sides, 2)
        assert moved.max() <= 0.25 + 1e-3, "a jittered box is still its object's"


def test_no_mask_covers_what_is_no_image(batch: augment.Batch) -> None:
    pad = np.array(SETTINGS.pad)
    empty = (np.abs(np.asarray(batch.images) - pad) < 1e-3).all(-1)
    cells = empty.reshape(16, TINY.mask_size, 4, TINY.mask_size, 4).all((2, 4))
    covered = np.asarray(batch.masks * batch.weight[..., None, None])
    assert cells.any() and not (covered * cells[:, None]).any()


def test_whole_views_are_what_the_predictor_shows(packed: tuple[atlases.Atlas, tuple[str, ...]]) -> None:
    atlas, sources = packed
    plain = augment.plain(SETTINGS)
    shown = make(jax.random.key(0), atlas, weights_of(sources, "made"), plain)
    images = np.asarray(shown.images)
    assert (images[:, 48:] == np.float32(SETTINGS.pad)).all(), "120 x 90 leaves the lowest quarter empty"
    bright = images[..., 0] > 190
    for i, j in np.argwhere(np.asarray(shown.weight) > 0):
        mask = np.kron(np.asarray(shown.masks[i, j]) > 0.99, np.ones((4, 4), bool))
        assert bright[i][mask].mean() > 0.85 or bright[i][mask].mean() < 0.15, "image and masks were cut alike"
    np.testing.assert_array_equal(shown.boxes, shown.true_boxes)


def test_mirrored_views_are_mirrored(packed: tuple[atlases.Atlas, tuple[str, ...]]) -> None:
    atlas, sources = packed
    plain = augment.plain(SETTINGS)
    flipped = dataclasses.replace(plain, views=dataclasses.replace(plain.views, flip_share=1.0))
    scenes = weights_of(sources, "curve_scene")
    one, two = (make(jax.random.key(5), atlas, scenes, s) for s in (plain, flipped))
    np.testing.assert_allclose(one.images[:, :, ::-1], two.images, atol=1e-3)
    np.testing.assert_allclose(64 - one.true_boxes[..., 2], two.true_boxes[..., 0], atol=1e-3)
    # Samples of a mask are not quite symmetric in their cells.
    assert np.abs(np.asarray(one.masks[..., ::-1]) - np.asarray(two.masks)).mean() < 0.02


def test_what_a_photograph_shows_is_shared_out(
    packed: tuple[atlases.Atlas, tuple[str, ...]], batch: augment.Batch
) -> None:
    """The made segments of an image do not overlap, so whatever is pasted onto whatever, their masks do not either."""
    for i in range(16):
        masks = {
            np.asarray(m).tobytes(): np.asarray(m) for m, w in zip(batch.masks[i], batch.weight[i], strict=True) if w
        }
        assert sum(masks.values(), np.zeros((TINY.mask_size,) * 2)).max(initial=0) <= 1 + 1e-6


def test_perfect_logits_have_no_loss(batch: augment.Batch) -> None:
    target = jnp.asarray(batch.masks[0, :1] > 0.5, jnp.float32)
    good, bad = 20 * (target - 0.5), 20 * (0.5 - target)
    assert losses.dice_loss(good, target)[0] < 0.01 < losses.dice_loss(bad, target)[0]
    area = jnp.ones(1) * 100
    assert losses.focal_loss(good, target, area)[0] < 1e-3 < losses.focal_loss(bad, target, area)[0]
    np.testing.assert_allclose(losses.mask_iou(good, target), 1.0, atol=1e-3)
    np.testing.assert_allclose(losses.mask_iou(bad, target), 0.0, atol=1e-3)


def test_an_empty_answer_costs_small_and_large_objects_alike() -> None:
    nothing = jnp.full((64, 64), -30.0)
    small, large = (jnp.zeros((64, 64)).at[:n, :n].set(1.0) for n in (2, 32))
    assert losses.dice_loss(nothing, small) > 0.97 and losses.dice_loss(nothing, large) > 0.97


def test_balanced_loss_weighs_object_and_background_alike() -> None:
    region = jnp.ones((8, 8))
    small = jnp.zeros((8, 8)).at[0, :4].set(1.0)
    everything_background = jnp.full((8, 8), -30.0)
    half_right = losses.balanced_bce(everything_background, small, region)
    # The background is right, the object wrong at 30 nats a cell, damped by the +1 in its count.
    np.testing.assert_allclose(half_right, 0.5 * 30 * 4 / 5, rtol=1e-4)


def test_clicks_fall_on_errors() -> None:
    target = jnp.zeros((1, 2, 16, 16)).at[:, :, 4:12, 4:12].set(1.0)
    logits = jnp.stack([jnp.full((16, 16), -5.0), jnp.full((16, 16), 5.0)])[None]
    points, labels = losses.error_clicks(jax.random.key(0), logits, target, 64)
    np.testing.assert_array_equal(labels, [[1, 0]])  # the object was missed; the background was taken
    x, y = np.asarray(points[0]).T // 4
    inside = (x >= 4) & (x < 12) & (y >= 4) & (y < 12)
    np.testing.assert_array_equal(inside, [True, False])


def _train(out: Path, packed: tuple[atlases.Atlas, tuple[str, ...]], lengths: tuple[int, int, int]) -> dict:
    pretrain, warm, joint = lengths
    plan = schedule.Schedule(pretrain_steps=pretrain, warm_steps=warm, joint_steps=joint, ramp=2)
    run = train.RunSettings(scene_share=0.5, precision="float32", log_every=2, eval_every=100, eval_batches=1)
    run = dataclasses.replace(run, save_minutes=0.0)
    settings = dataclasses.replace(SETTINGS, batch=2)
    return train.train(out, Sam(TINY), plan, settings, run, *packed)


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_weights(
    tmp_path: Path, packed: tuple[atlases.Atlas, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _train(tmp_path / "whole", packed, (2, 2, 4))
    real = train.save_state

    def killed_after(path: Path, saved: schedule.TrainState, fingerprint: str) -> None:
        real(path, saved, fingerprint)
        if int(saved.step) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_state", killed_after)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "parts", packed, (2, 2, 4))
    monkeypatch.setattr(train, "save_state", real)
    parts = _train(tmp_path / "parts", packed, (2, 2, 4))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)
    config, shipped = load_params(tmp_path / "parts" / "mini.safetensors")
    assert config == TINY and "auxiliary" not in shipped
    rows = [json.loads(line) for line in (tmp_path / "parts" / "curve.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 8 and "photo_blank" in rows[-1] and "scene_box" in rows[-1]


@pytest.mark.slow
def test_loss_falls_where_there_is_something_to_learn(packed: tuple[atlases.Atlas, tuple[str, ...]]) -> None:
    atlas, sources = packed
    sam = Sam(TINY)
    plan = schedule.Schedule(pretrain_steps=60, pretrain_rate=5e-3, ramp=5)
    step = schedule.make_step(
        sam, plan, augment.plain(SETTINGS), losses.LossWeights(), "pretrain", jnp.dtype("float32")
    )
    now = schedule.start_state(start.init_params(sam, 0), plan)
    cumulative, found = weights_of(sources, "made"), []
    for _ in range(60):
        now, metrics = step(now, jax.random.key(0), jnp.asarray(60), atlas, cumulative)
        found.append(float(metrics["loss"]))
    assert np.mean(found[-5:]) < 0.8 * np.mean(found[:5]), found


def test_foreign_and_corrupt_states_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    now = schedule.start_state(start.init_params(Sam(TINY), 0), schedule.Schedule())
    state.save_state(path, now, "one run")
    restored = state.load_state(path, now, "one run")
    for a, b in zip(jax.tree.leaves(now), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="other flags"):
        state.load_state(path, now, "another run")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable training state"):
        state.load_state(path, now, "one run")


def test_schedule_phases_and_rates() -> None:
    plan = schedule.Schedule(pretrain_steps=100, warm_steps=60, joint_steps=200, ramp=10)
    assert [plan.phase(s) for s in (0, 99, 100, 159, 160)] == ["pretrain", "pretrain", "warm", "warm", "joint"]
    total = jnp.asarray(plan.total)
    assert plan.rates(jnp.array(120), total)[0] == 0.0, "the encoder rests while the decoder warms up"
    np.testing.assert_allclose(plan.rates(jnp.array(200), total), (plan.encoder_rate, plan.decoder_rate), rtol=1e-6)
    assert plan.rates(total, total) == (0.0, 0.0)
    frozen = dataclasses.replace(plan, frozen_encoder=True)
    assert frozen.rates(jnp.array(200), total)[0] == 0.0


def test_shrunk_folders_are_read_alike(folder: Path, tmp_path: Path) -> None:
    found = folders.find_folders(str(folder), "")[0]
    count = shrink.shrink(found, tmp_path / "photos" / "images", tmp_path / "photos" / "segments.json", 60, 90)
    small = folders.list_records(folders.find_folders(str(tmp_path / "photos"), "")[0])
    assert count == len(small) == 4 and {r.source for r in small} == {"made"}
    one, two = (folders.read_photograph(r, 60) for r in (folders.list_records(found)[2], small[2]))
    np.testing.assert_array_equal(one.segments, two.segments)
    assert np.abs(one.image.astype(int) - two.image).mean() < 12


def test_missing_photographs_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; give a COCO image folder"):
        folders.find_folders(str(tmp_path / "none"), "")


def test_weights_of_sources_are_parsed() -> None:
    assert train_mini.parse_weights("a=3,b=0.4") == (("a", 3.0), ("b", 0.4))
    with pytest.raises(ValueError, match="write name=weight"):
        train_mini.parse_weights("a")
