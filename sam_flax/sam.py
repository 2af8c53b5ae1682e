"""The whole model: `Sam`, a Linen module, for init and whole-graph use; `SamModel` to run it by stages."""

import dataclasses
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam_flax.config import SamConfig
from sam_flax.encoders.vit import Block, ImageEncoderViT, Neck, PatchEmbed, make_block
from sam_flax.heads.mask_decoder import MaskDecoder
from sam_flax.heads.prompt_encoder import PromptEncoder
from sam_flax.layers import in_float32
from sam_flax.stages import EMBEDDED, Stage, StageGraph

Params = dict[str, Any]  # nested, float32 arrays at the leaves
Points = tuple[jax.Array, jax.Array]
Precision = Literal["float32", "tensorfloat32", "bfloat16"]


def check_canvas(images: jax.Array, config: SamConfig) -> None:
    """Raises ValueError unless `images` is (batch, S, S, 3)."""
    size = config.img_size
    if images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise ValueError(
            f"encode_image needs images of shape (batch, {size}, {size}, 3) but got {images.shape}; "
            "resize and pad them with sam_flax.preprocessing."
        )


class Sam(nn.Module):
    """Segment Anything as a function of a parameter pytree (modeling/sam.py).

    Use `sam.apply({"params": params}, ..., method="encode_image" | "encode_prompts" | "decode_masks")`.
    """

    config: SamConfig

    def setup(self) -> None:
        self.image_encoder = ImageEncoderViT(self.config)
        self.prompt_encoder = PromptEncoder(self.config)
        self.mask_decoder = MaskDecoder(self.config)

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Normalised, padded images (B, S, S, 3) -> embeddings (B, g, g, C)."""
        check_canvas(images, self.config)
        return self.image_encoder(images)

    def encode_prompts(
        self,
        points: Points | None = None,
        boxes: jax.Array | None = None,
        masks: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """See `PromptEncoder.__call__`: prompts -> sparse (N, T, C), dense (N, g, g, C)."""
        return self.prompt_encoder(points, boxes, masks)

    def decode_masks(
        self,
        image_embeddings: jax.Array,
        sparse: jax.Array,
        dense: jax.Array,
        multimask_output: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """Embeddings -> logits (N, M, 4g, 4g), predicted IoU (N, M); `multimask_output`: M = 3, else 1."""
        if image_embeddings.shape[0] not in (1, sparse.shape[0]):
            raise ValueError(
                f"There are {image_embeddings.shape[0]} image embeddings for {sparse.shape[0]} prompts; give one for "
                "all prompts or one for each."
            )
        pe = self.prompt_encoder.get_dense_pe()
        logits, iou = self.mask_decoder(image_embeddings, pe, sparse, dense)
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        return logits[:, chosen], iou[:, chosen]

    def decode(
        self,
        image_embeddings: jax.Array,
        points: Points | None = None,
        boxes: jax.Array | None = None,
        masks: jax.Array | None = None,
        multimask_output: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """`encode_prompts` and `decode_masks` in one."""
        sparse, dense = self.encode_prompts(points, boxes, masks)
        return self.decode_masks(image_embeddings, sparse, dense, multimask_output)

    def __call__(
        self,
        images: jax.Array,
        points: Points | None = None,
        boxes: jax.Array | None = None,
        masks: jax.Array | None = None,
        multimask_output: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """Images (1 or N, S, S, 3) with N prompts -> logits and predicted IoU."""
        return self.decode(self.encode_image(images), points, boxes, masks, multimask_output)

    def init_params(self, key: jax.Array) -> Params:
        """Random float32 parameters, every branch included."""
        size, mask = self.config.img_size, self.config.mask_size
        images = jnp.zeros((1, size, size, 3))
        points = (jnp.zeros((1, 1, 2)), jnp.ones((1, 1), jnp.int32))
        args = (images, points, jnp.zeros((1, 4)), jnp.zeros((1, mask, mask, 1)))
        shapes = jax.eval_shape(self.init, key, *args)
        # Initialised without running the forward pass: at SAM-H size that pass costs minutes.
        return _random_like(shapes["params"], key)


def call(module: nn.Module, params: Params, *args: Any, method: str | None = None, **kwargs: Any) -> Any:
    """A module as a function of its parameters."""
    return module.apply({"params": params}, *args, method=method, **kwargs)


def _random_like(shapes: Params, key: jax.Array) -> Params:
    """Draws parameters of the given shapes with the layers' own initialisers, leaf by leaf."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    values = []
    for index, (path, leaf) in enumerate(leaves):
        leaf_key, name = jax.random.fold_in(key, index), path[-1].key
        if name == "kernel":
            init = nn.initializers.xavier_uniform() if leaf.ndim == 2 else nn.initializers.lecun_normal()
        elif name == "scale":
            init = nn.initializers.ones
        elif name == "pos_embed":
            init = nn.initializers.normal(0.02)
        elif name in ("bias", "rel_pos_h", "rel_pos_w"):
            init = nn.initializers.zeros
        else:  # tokens, embeddings and the Fourier matrix
            init = nn.initializers.normal(1.0)
        values.append(init(leaf_key, leaf.shape, leaf.dtype))
    return jax.tree_util.tree_unflatten(treedef, values)


@partial(jax.jit, static_argnums=0)
@in_float32
def apply_embed(module: PatchEmbed, params: Params, images: jax.Array) -> jax.Array:
    """Images (B, S, S, 3) -> tokens (B, g, g, D) with positions added; `params` is the image encoder's."""
    return call(module, params["patch_embed"], images) + params["pos_embed"]


@partial(jax.jit, static_argnames=("module", "precision"))
def apply_stage(module: Block | Neck, params: Params, x: jax.Array, precision: Precision) -> jax.Array:
    """One block or the neck on its own parameters."""
    with jax.default_matmul_precision(precision):
        return call(module, params, x)


@partial(jax.jit, static_argnames=("sam", "multimask_output", "precision"))
def apply_decode(
    sam: Sam,
    params: Params,
    image_embeddings: jax.Array,
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
    """A SAM with its parameters, run stage by stage: two compilations serve any number of encoder blocks.

    Attributes:
        sam: the module.
        params: its parameters.
        precision: of matrix products. GPUs and TPUs have faster ones than "float32" ("tensorfloat32", "bfloat16",
            summed in float32), and would take them by default; CPUs always compute in float32.
    """

    sam: Sam
    params: Params
    precision: Precision = "float32"

    @property
    def config(self) -> SamConfig:
        return self.sam.config

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Images (B, S, S, 3), normalised and padded -> embeddings (B, g, g, C)."""
        encoder = self.params["image_encoder"]
        x = embed_image(self.config, self.params, images)
        for key, module in encoder_stages(self.config):
            x = apply_stage(module, encoder[key], x, self.precision)
        return x

    def decode(
        self,
        image_embeddings: jax.Array,
        points: Points | None = None,
        boxes: jax.Array | None = None,
        masks: jax.Array | None = None,
        multimask_output: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """See `Sam.decode`."""
        params = {k: self.params[k] for k in ("prompt_encoder", "mask_decoder")}
        prompts = (image_embeddings, points, boxes, masks)
        return apply_decode(self.sam, params, *prompts, multimask_output, self.precision)
