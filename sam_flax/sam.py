"""`Sam`, the plain-ViT segmenter, as a Linen module; `SamModel` runs a segmenter of any family by its stages."""

import dataclasses
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax

from sam_flax.config import SamConfig, SegmenterConfig
from sam_flax.encoders.vit import Block, ImageEncoderViT, Neck, PatchEmbed, make_block
from sam_flax.layers import in_float32
from sam_flax.segmenter import Params as Params
from sam_flax.segmenter import Points as Points
from sam_flax.segmenter import Segmenter, call, check_canvas, parameters_at
from sam_flax.stages import EMBEDDED, Stage, StageGraph

Precision = Literal["float32", "tensorfloat32", "bfloat16"]


class Sam(Segmenter):
    """Segment Anything with a plain ViT (modeling/sam.py)."""

    config: SamConfig

    @nn.nowrap
    def make_encoder(self) -> ImageEncoderViT:
        return ImageEncoderViT(self.config)

    @nn.nowrap
    def stages(self) -> StageGraph:
        return stage_graph(self.config)

    @nn.nowrap
    def embed(self, params: Params, images: jax.Array) -> jax.Array:
        return embed_image(self.config, params, images)


@partial(jax.jit, static_argnums=0)
@in_float32
def apply_embed(module: PatchEmbed, params: Params, images: jax.Array) -> jax.Array:
    """Images (B, S, S, 3) -> tokens (B, g, g, D) with positions added; `params` is the image encoder's."""
    return call(module, params["patch_embed"], images) + params["pos_embed"]


@partial(jax.jit, static_argnames=("module", "precision"))
def apply_stage(module: nn.Module, params: Params, x: Any, precision: Precision) -> Any:
    """One stage on its own parameters; `x` is its input, or a tuple of its inputs."""
    with jax.default_matmul_precision(precision):
        return call(module, params, *(x if isinstance(x, tuple) else (x,)))


@partial(jax.jit, static_argnames=("sam", "multimask_output", "precision"))
def apply_decode(
    sam: Segmenter,
    params: Params,
    image_embeddings: Any,
    points: Points | None,
    boxes: jax.Array | None,
    masks: jax.Array | None,
    multimask_output: bool,
    precision: Precision,
) -> tuple[jax.Array, jax.Array]:
    with jax.default_matmul_precision(precision):
        return call(sam, params, image_embeddings, points, boxes, masks, multimask_output, method="decode")


def encoder_stages(config: SamConfig) -> list[tuple[str, Block | Neck]]:
    """(parameter key, module) of everything after the patch embedding, in forward order."""
    stages: list[tuple[str, Block | Neck]] = [(f"blocks_{i}", make_block(config, i)) for i in range(config.depth)]
    return [*stages, ("neck", Neck(config.embed_dim, config.out_chans, parent=None))]


def stage_graph(config: SamConfig) -> StageGraph:
    """`encoder_stages` as a graph: a chain from the embedded image to the neck."""
    stages, before = [], EMBEDDED
    for key, module in encoder_stages(config):
        stages.append(Stage(key, f"image_encoder/{key}/", module, (before,)))
        before = key
    return StageGraph(tuple(stages), (before,))


def embed_image(config: SamConfig, params: Params, images: jax.Array) -> jax.Array:
    """Images (B, S, S, 3), normalised and padded -> tokens (B, g, g, D), what the first stage takes.

    Args:
        config: of the model.
        params: all of the model's; only those of the patch embedding and the positions are read.
        images: the canvases.

    Raises:
        ValueError: if the images have another size.
    """
    check_canvas(images, config)
    own = {key: params["image_encoder"][key] for key in ("patch_embed", "pos_embed")}
    return apply_embed(PatchEmbed(config.patch_size, config.embed_dim, parent=None), own, images)


@dataclasses.dataclass(frozen=True)
class SamModel:
    """A segmenter with its parameters, run stage by stage: a compilation for each kind of stage serves all of them.

    Attributes:
        sam: the module, of any family.
        params: its parameters.
        precision: of matrix products. GPUs and TPUs have faster ones than "float32" ("tensorfloat32", "bfloat16",
            summed in float32), and would take them by default; CPUs always compute in float32.
    """

    sam: Any  # a `Segmenter`
    params: Params
    precision: Precision = "float32"

    @property
    def config(self) -> SegmenterConfig:
        return self.sam.config

    def encode_image(self, images: jax.Array) -> Any:
        """Images (B, S, S, 3), normalised, on the canvas -> what `decode` takes: SAM's embeddings (B, g, g, C)."""

        def apply(stage: Stage, inputs: tuple[Any, ...]) -> Any:
            x = inputs[0] if len(inputs) == 1 else inputs
            return apply_stage(stage.module, parameters_at(self.params, stage.prefix), x, self.precision)

        return self.sam.stages().run(self.sam.embed(self.params, images), apply)

    def decode(
        self,
        image_embeddings: Any,
        points: Points | None = None,
        boxes: jax.Array | None = None,
        masks: jax.Array | None = None,
        multimask_output: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """See `Segmenter.decode`."""
        params = {k: self.params[k] for k in ("prompt_encoder", "mask_decoder")}
        prompts = (image_embeddings, points, boxes, masks)
        return apply_decode(self.sam, params, *prompts, multimask_output, self.precision)
