"""Small models of other families, and learning from a teacher's embeddings."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.mini import atlas as atlases
from experiments.mini import augment, losses, schedule, start, teacher, views
from experiments.mini.forward import encode
from experiments.mini.models import MODELS
from sam_flax import SamConfig, save_params
from sam_flax.encoders.hiera import Features, Sam2Config
from sam_flax.encoders.tiny_vit import MobileSamConfig
from sam_flax.errors import InputError
from sam_flax.mobile_sam import MobileSam
from sam_flax.sam import Sam
from sam_flax.sam2 import Sam2

_HEADS: dict[str, Any] = {
    "out_chans": 16, "mask_in_chans": 4, "decoder_depth": 1, "decoder_num_heads": 2, "decoder_mlp_dim": 16,
    "iou_head_hidden_dim": 16,
}  # fmt: skip
TEACHER = Sam(
    SamConfig(
        **_HEADS, img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=1, window_size=2, global_attn_indexes=(0,)
    )
)
STUDENTS = {
    "mobile_sam": MobileSam(
        MobileSamConfig(
            **_HEADS, img_size=32, patch_size=8, embed_dims=(8, 16), depths=(1, 1), num_heads=(2,), window_sizes=(2,),
            merge_strides=(2,),
        )
    ),
    "sam2": Sam2(
        Sam2Config(
            **_HEADS, img_size=64, patch_size=16, embed_dim=4, num_heads=1, depths=(1, 1, 1, 1),
            window_sizes=(4, 4, 2, 2), global_attn_indexes=(0,), background_size=3,
        )
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=sorted(STUDENTS))
def student(request: pytest.FixtureRequest) -> Any:
    return STUDENTS[request.param]


@pytest.fixture(scope="module")
def taught() -> teacher.Teacher:
    return teacher.Teacher(TEACHER, TEACHER.init_params(jax.random.key(1)))


def test_models_of_all_families_have_the_size_of_mini_scenes() -> None:
    sizes = {}
    for name, sam in MODELS.items():
        shapes = jax.eval_shape(sam.init_params, jax.random.key(0))
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert name == "mini" or (sam.config.grid, sam.config.out_chans) == (20, 128)
    assert all(1.5e6 < sizes[name] < 3e6 for name in ("mini-scenes", "mini-tiny-vit", "mini-hiera")), sizes


def test_heads_are_taken_over_and_encoders_are_not(student: Any, taught: teacher.Teacher) -> None:
    before = student.init_params(jax.random.key(0))
    after = teacher.with_heads_of(before, taught.params)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for head in ("prompt_encoder", "mask_decoder"):
        own = {**after[head]}
        for name in set(own) - set(taught.params[head]):
            assert name in ("obj_score_token", "pred_obj_score_head"), "what SAM does not have"
            del own[name]
        jax.tree.map(np.testing.assert_array_equal, own, taught.params[head])
    neck = after["image_encoder"]["neck"]
    for name in neck:
        if name.startswith("high_res"):
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(neck[name]))
    block = "blocks_0"
    jax.tree.map(np.testing.assert_array_equal, after["image_encoder"][block], before["image_encoder"][block])


def test_distance_is_relative_to_the_teacher_and_leaves_it_alone(student: Any, taught: teacher.Teacher) -> None:
    side, precision = student.config.img_size, jnp.dtype("float32")
    ramp = jnp.linspace(40.0, 210.0, 32)[None, :, None, None]
    small = jnp.concatenate([ramp + 0 * ramp.swapaxes(1, 2), ramp.swapaxes(1, 2) + 0 * ramp]) + jnp.zeros(3)
    images = jnp.repeat(jnp.repeat(small, side // 32, 1), side // 32, 2)
    wanted = jax.jit(lambda params: encode(TEACHER, params, small, precision))(taught.params)

    @jax.jit
    def distance(embedding: jax.Array, params: Any) -> jax.Array:
        features = Features(embedding, embedding, embedding) if isinstance(student, Sam2) else embedding
        return teacher.distance(student, features, teacher.Teacher(TEACHER, params), images, precision)

    # Each pixel of the small image is a square of the large one: resampling gives it back but for its edges.
    assert float(distance(wanted, taught.params)) < (1e-3 if side == 32 else 0.03)
    np.testing.assert_allclose(distance(jnp.zeros_like(wanted), taught.params), 1.0, rtol=1e-5)
    frozen = jax.jit(jax.grad(distance, argnums=1))(wanted + 1, taught.params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen))


def test_a_teacher_of_another_grid_is_refused(student: Any, taught: teacher.Teacher, tmp_path: Path) -> None:
    path = str(tmp_path / "teacher.safetensors")
    save_params(path, TEACHER.config, taught.params)
    assert teacher.load_teacher(path, student).sam == TEACHER
    with pytest.raises(InputError, match="embeddings of 4x4 tokens and 16 channels, but --config of 20x20 and 128"):
        teacher.load_teacher(path, MODELS["mini-tiny-vit"])


@pytest.mark.slow
def test_it_learns_from_a_teacher_and_then_from_masks(student: Any, taught: teacher.Teacher) -> None:
    side = student.config.img_size
    settings = atlases.AtlasSettings(side=96, scenes=8, curve_scenes=0, scene_size=64)
    atlas, sources = atlases.build_atlas([], [], settings, workers=1)
    batches = augment.BatchSettings(
        batch=4, cells=student.config.mask_size, views=views.ViewSettings(canvas=side, prompts=2)
    )
    cumulative = jnp.asarray(atlases.cumulative_weights(sources, {}, 1.0))
    plan = schedule.Schedule(pretrain_steps=40, warm_steps=0, joint_steps=4, pretrain_rate=3e-3, ramp=5)
    params = teacher.with_heads_of(start.init_params(student, 0), taught.params)
    now, found = schedule.start_state(params, plan), []
    for phase, steps in (("pretrain", 40), ("joint", 4)):
        step = schedule.make_step(student, plan, batches, losses.LossWeights(), phase, jnp.dtype("float32"), taught.sam)
        for _ in range(steps):
            now, metrics = step(now, jax.random.key(0), jnp.asarray(plan.total), atlas, cumulative, taught.params)
            found.append(float(metrics["teacher"]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(now.params))
    assert np.mean(found[35:]) < 0.7 * np.mean(found[:5]), found
