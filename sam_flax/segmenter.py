"""What every promptable segmenter of this package is: a Linen module with a configuration, run whole or by stages."""

import abc
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam_flax.config import SegmenterConfig
from sam_flax.heads.mask_decoder import MaskDecoder
from sam_flax.heads.prompt_encoder import PromptEncoder
from sam_flax.stages import StageGraph

Params = dict[str, Any]  # nested, float32 arrays at the leaves
Points = tuple[jax.Array, jax.Array]


def check_canvas(images: jax.Array, config: SegmenterConfig) -> None:
    """Raises ValueError unless `images` is (batch, S, S, 3)."""
    size = config.img_size
    if images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise ValueError(
            f"encode_image needs images of shape (batch, {size}, {size}, 3) but got {images.shape}; "
            "resize and pad them with sam_flax.preprocessing."
        )


class Segmenter(nn.Module, abc.ABC):
    """A promptable segmenter as a function of a parameter pytree.

    A family is a subclass that says what its image encoder is. Use
    `model.apply({"params": params}, ..., method="encode_image" | "encode_prompts" | "decode_masks")`.
    """

    config: Any  # a `SegmenterConfig`; a family says which

    @nn.nowrap
    @abc.abstractmethod
    def make_encoder(self) -> nn.Module:
        """The image encoder: images (B, S, S, 3) to what `decode_masks` takes."""

    @nn.nowrap
    @abc.abstractmethod
    def stages(self) -> StageGraph:
        """The image encoder as stages behind `embed`."""

    @nn.nowrap
    def embed(self, params: Params, images: jax.Array) -> jax.Array:
        """Images (B, S, S, 3), normalised and padded -> what the stages call `EMBEDDED`; here the images themselves.

        Args:
            params: all of the model's.
            images: the canvases.

        Raises:
            ValueError: if the images have another size.
        """
        del params
        check_canvas(images, self.config)
        return images

    @nn.nowrap
    def make_heads(self) -> tuple[Any, Any]:
        """The prompt encoder and the mask decoder, which are SAM's unless a family has others."""
        return PromptEncoder(self.config), MaskDecoder(self.config)

    def setup(self) -> None:
        self.image_encoder = self.make_encoder()
        self.prompt_encoder, self.mask_decoder = self.make_heads()

    def encode_image(self, images: jax.Array) -> Any:
        """Normalised images (B, S, S, 3) on the canvas -> what `decode` takes: SAM's embeddings (B, g, g, C)."""
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
        image_embeddings: Any,
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
        image_embeddings: Any,
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
        return random_like(shapes["params"], key)


def call(module: nn.Module, params: Params, *args: Any, method: str | None = None, **kwargs: Any) -> Any:
    """A module as a function of its parameters."""
    return module.apply({"params": params}, *args, method=method, **kwargs)


def parameters_at(params: Params, prefix: str) -> Params:
    """The part of nested parameters at a path such as "image_encoder/blocks_0/"."""
    for key in prefix.strip("/").split("/"):
        params = params[key]
    return params


# A generator draws this many values at a call, whatever the shape that is asked for: a generator of another size is
# another program, and compiling it takes half a second on a CPU, 25 s for the 26 shapes of a SAM of two blocks.
_CHUNK = 1 << 16
_UNIFORM = jax.jit(lambda key: jax.random.uniform(key, (_CHUNK,), minval=-1.0))
_NORMAL = jax.jit(lambda key: jax.random.normal(key, (_CHUNK,)))
# Of unit variance after it is cut at two deviations, as Flax's `lecun_normal`.
_TRUNCATED = jax.jit(lambda key: jax.random.truncated_normal(key, -2.0, 2.0, (_CHUNK,)) / 0.87962566103423978)


def _draw(generator: Callable[[jax.Array], jax.Array], key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    size = math.prod(shape)
    chunks = [generator(jax.random.fold_in(key, i)) for i in range(-(-size // _CHUNK))]
    return (chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks))[:size].reshape(shape)


def random_like(shapes: Params, key: jax.Array) -> Params:
    """Draws float32 parameters of the given shapes from the distributions of the layers' own initialisers.

    Matrices are uniform after Glorot, kernels of convolutions normal after LeCun, cut at two deviations.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    values = []
    for index, (path, leaf) in enumerate(leaves):
        leaf_key, name, shape = jax.random.fold_in(key, index), path[-1].key, leaf.shape
        if name == "kernel" and leaf.ndim == 2:
            value = (6 / sum(shape)) ** 0.5 * _draw(_UNIFORM, leaf_key, shape)
        elif name == "kernel":
            value = math.prod(shape[:-1]) ** -0.5 * _draw(_TRUNCATED, leaf_key, shape)
        elif name == "scale":
            value = jnp.ones(shape)
        elif name in ("pos_embed", "pos_embed_window", "no_mem_embed"):
            value = 0.02 * _draw(_NORMAL, leaf_key, shape)
        elif name in ("bias", "rel_pos_h", "rel_pos_w", "attention_biases"):
            value = jnp.zeros(shape)
        else:  # tokens, embeddings and the Fourier matrix
            value = _draw(_NORMAL, leaf_key, shape)
        values.append(value)
    return jax.tree_util.tree_unflatten(treedef, values)
