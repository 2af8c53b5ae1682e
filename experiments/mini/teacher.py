"""A trained model from which another one's encoder learns: decoupled distillation, as MobileSAM (arXiv 2306.14289)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ahcptq_jax.architectures.sites import flatten, unflatten
from experiments.mini.forward import embedding_of, encode
from sam_flax.errors import InputError
from sam_flax.files.checkpoint import load_sam
from sam_flax.sam import Params
from sam_flax.segmenter import Segmenter

HEADS = ("prompt_encoder/", "mask_decoder/")


class Teacher(NamedTuple):
    """A model that is trained already."""

    sam: Segmenter
    params: Params


def load_teacher(checkpoint: str, sam: Segmenter) -> Teacher:
    """The teacher of a model: its name or file as `load_sam` takes it.

    Raises:
        InputError: if it cannot be loaded, or makes embeddings of another shape than the model.
    """
    teacher = Teacher(*load_sam(checkpoint))
    own, other = ((s.config.grid, s.config.out_chans) for s in (sam, teacher.sam))
    if own != other:
        raise InputError(
            f"--teacher={checkpoint} makes embeddings of {other[0]}x{other[0]} tokens and {other[1]} channels, but "
            f"--config of {own[0]}x{own[0]} and {own[1]}; choose another teacher."
        )
    return teacher


def with_heads_of(params: Params, teacher: Params) -> Params:
    """The parameters with the teacher's prompt encoder and mask decoder, as far as it has them.

    SAM 2's features of high resolution, of which SAM's heads know nothing, start at zero.
    """
    found, given = flatten(params), flatten(teacher)
    for path, own in found.items():
        other = given.get(path)
        if path.startswith(HEADS) and other is not None and jnp.shape(other) == jnp.shape(own):
            # Copied: a step of training takes the memory of its parameters for its results.
            found[path] = jnp.array(other, jnp.float32, copy=True)
        elif path.startswith("image_encoder/neck/high_res_"):
            found[path] = jnp.zeros_like(own)
    return unflatten(found)


def distance(sam: Segmenter, features: Any, teacher: Teacher, images: jax.Array, precision: jnp.dtype) -> jax.Array:
    """Mean squared error of a model's embeddings, relative to the mean square of its teacher's.

    Args:
        sam: the model.
        features: what its encoder makes of the images.
        teacher: the teacher.
        images: (B, S, S, 3), 0..255, on the model's canvas.
        precision: of the teacher's forward pass.
    """
    side = teacher.sam.config.img_size
    if side != sam.config.img_size:
        images = jax.image.resize(images, (len(images), side, side, 3), "linear")
    made = jax.lax.stop_gradient(encode(teacher.sam, teacher.params, images, precision))
    found, wanted = (embedding_of(a).astype(jnp.float32) for a in (features, made))
    return jnp.mean(jnp.square(found - wanted)) / jnp.mean(jnp.square(wanted))
