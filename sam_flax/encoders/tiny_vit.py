"""TinyViT, the image encoder of MobileSAM (ChaoningZhang/MobileSAM, modeling/tiny_vit_sam.py).

Convolutions with batch norm where the image is large, then windowed attention with a bias for every distance between
two tokens. What batch norm computes when a model is used is a scale and an offset, and these two are its parameters
here; `convolutions.folded` moves the scale into the kernel.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sam_flax.config import SegmenterConfig
from sam_flax.convolutions import ConvNorm
from sam_flax.encoders.attention import attention
from sam_flax.encoders.vit import Neck, split_heads, window_unpartition
from sam_flax.errors import InputError
from sam_flax.layers import Linear, MLPBlock, Site, gelu, layer_norm
from sam_flax.stages import EMBEDDED, Stage, StageGraph


@dataclasses.dataclass(frozen=True, kw_only=True)
class MobileSamConfig(SegmenterConfig):
    """Everything that fixes the computation graph of a MobileSAM: a TinyViT of any number of layers, and SAM's heads.

    A layer is a number of blocks on one grid. Those of the first are convolutions, those of the others attend. Every
    layer but the last ends in a merge, which changes the width and may halve the grid.

    Raises:
        InputError: if the lists disagree, a width is no multiple of its heads, or the grid does not come out.
    """

    family: ClassVar[str] = "mobile_sam"

    embed_dims: tuple[int, ...]  # per layer
    depths: tuple[int, ...]  # blocks of each layer
    num_heads: tuple[int, ...]  # per layer that attends: one fewer
    window_sizes: tuple[int, ...]  # likewise, tokens
    merge_strides: tuple[int, ...]  # per merge
    mlp_ratio: float = 4.0
    expand_ratio: float = 4.0  # hidden / width of the convolutional blocks
    local_kernel: int = 3  # side of the depthwise convolution between attention and MLP

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = len(self.embed_dims)
        after = (self.num_heads, self.window_sizes, self.merge_strides)
        if len(self.depths) != layers or any(len(values) != layers - 1 for values in after):
            raise InputError(
                f"{layers} layers need as many depths, and one fewer num_heads, window_sizes and merge_strides, but "
                f"there are {[len(self.depths), *map(len, after)]}; give one value for each."
            )
        for width, heads in zip(self.embed_dims[1:], self.num_heads, strict=True):
            if width % heads:
                raise InputError(f"embed_dims {width} is not a multiple of num_heads {heads}; change one of them.")
        if 4 * int(np.prod(self.merge_strides)) != self.patch_size:
            raise InputError(
                f"patch_size={self.patch_size} must be 4 times the merge_strides {self.merge_strides}; change one."
            )

    def layers(self) -> int:
        return max(sum(self.depths), super().layers())

    def layer_grid(self, layer: int) -> int:
        """Tokens along one side in a layer."""
        return self.img_size // (4 * int(np.prod(self.merge_strides[:layer], dtype=int)))

    def layer_of(self, block: int) -> int:
        """The layer of a block counted through all layers."""
        return int(np.searchsorted(np.cumsum(self.depths), block, side="right"))


MOBILE_SAM = MobileSamConfig(
    img_size=1024,
    patch_size=16,
    embed_dims=(64, 128, 160, 320),
    depths=(2, 2, 6, 2),
    num_heads=(4, 5, 10),
    window_sizes=(7, 14, 7),
    merge_strides=(2, 2, 1),
)


class PatchEmbed(nn.Module):
    """Image to tokens of four pixels, by two strided convolutions."""

    features: int

    def setup(self) -> None:
        self.conv1 = ConvNorm(3, self.features // 2, 3, stride=2)
        self.conv2 = ConvNorm(self.features // 2, self.features, 3, stride=2)

    def __call__(self, x: jax.Array) -> jax.Array:  # (B, S, S, 3) -> (B, S/4, S/4, D)
        return self.conv2(gelu(self.conv1(x)))


class ConvBlock(nn.Module):
    """A wide depthwise convolution between two narrow ones, with a residual (MBConv)."""

    dim: int
    hidden: int

    def setup(self) -> None:
        self.conv1 = ConvNorm(self.dim, self.hidden, 1)
        self.conv2 = ConvNorm(self.hidden, self.hidden, 3, depthwise=True)
        self.conv3 = ConvNorm(self.hidden, self.dim, 1)

    def __call__(self, x: jax.Array) -> jax.Array:  # (B, H, W, D) -> (B, H, W, D)
        return gelu(x + self.conv3(gelu(self.conv2(gelu(self.conv1(x))))))


class Merge(nn.Module):
    """To the width of the next layer, and to half its grid with a stride of 2 (PatchMerging)."""

    dim: int
    features: int
    stride: int

    def setup(self) -> None:
        self.conv1 = ConvNorm(self.dim, self.features, 1)
        self.conv2 = ConvNorm(self.features, self.features, 3, stride=self.stride, depthwise=True)
        self.conv3 = ConvNorm(self.features, self.features, 1)

    def __call__(self, x: jax.Array) -> jax.Array:  # (B, H, W, D) -> (B, H/stride, W/stride, features)
        return self.conv3(gelu(self.conv2(gelu(self.conv1(x)))))


def bias_indexes(side: int) -> np.ndarray:
    """For every pair of tokens of a window, (side**2, side**2), which bias is theirs: one for each distance.

    Distances, rows by columns, are numbered as they first occur from one token to the next; those from the first token
    are all there are, so that (rows, columns) is number side * rows + columns.
    """
    rows, cols = np.divmod(np.arange(side * side), side)
    return side * np.abs(rows[:, None] - rows) + np.abs(cols[:, None] - cols)


class Attention(nn.Module):
    """Self-attention in windows with a bias for every distance. Parameters as SAM's but for the biases."""

    dim: int
    num_heads: int
    window: int  # tokens

    def setup(self) -> None:
        self.qkv = Linear(self.dim, 3 * self.dim)
        self.proj = Linear(self.dim, self.dim)
        shape = (self.num_heads, self.window**2)
        self.attention_biases = self.param("attention_biases", nn.initializers.zeros, shape)
        self.q, self.k, self.v, self.softmax = Site(), Site(), Site(), Site()
        self.operands = Site()

    def biases(self) -> jax.Array:
        """(heads, window**2, window**2), added to the scores of every window."""
        return self.attention_biases[:, bias_indexes(self.window)]

    def split(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(B, H, W, D) -> queries, keys and values (B*windows, heads, window**2, d); H and W are whole windows."""
        parts = split_heads(self.qkv.product(x), self.qkv.bias, (self.window, self.window), self.num_heads)
        q, k, v = (part.reshape(-1, self.num_heads, *part.shape[1:]) for part in parts)
        return q, k, v

    def join(self, out: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """What the windows attended to, shaped as queries -> (B, H, W, D), projected."""
        windows = out.transpose(0, 2, 1, 3).reshape(-1, self.window, self.window, self.dim)
        return self.proj(window_unpartition(windows, grid))

    def __call__(self, x: jax.Array) -> jax.Array:  # (B, H, W, D) -> (B, H, W, D), H and W whole windows
        q, k, v = self.split(x)
        q, k, v = self.q(q), self.k(k), self.v(v)
        q, k, v, bias = self.operands((q * q.shape[-1] ** -0.5, k, v, self.biases()))
        return self.join(attention(q, k, v, self.softmax, bias), (x.shape[1], x.shape[2]))


class AttentionBlock(nn.Module):
    """Windowed attention, a depthwise convolution and an MLP; the first and the last with a residual (TinyViTBlock)."""

    dim: int
    num_heads: int
    window: int
    mlp_dim: int
    local_kernel: int

    def setup(self) -> None:
        self.norm1, self.norm2 = layer_norm(1e-5), layer_norm(1e-5)
        self.attn = Attention(self.dim, self.num_heads, self.window)
        self.local_conv = ConvNorm(self.dim, self.dim, self.local_kernel, depthwise=True)
        self.mlp = MLPBlock(self.dim, self.mlp_dim)

    def attention_part(self, x: jax.Array) -> jax.Array:  # (B, H, W, D) -> (B, H, W, D), residual included
        _, height, width, _ = x.shape
        # Zeros to whole windows stand before the norm here, not behind it as in SAM: they become its offset.
        padded = jnp.pad(x, ((0, 0), (0, -height % self.window), (0, -width % self.window), (0, 0)))
        return x + self.attn(self.norm1(padded))[:, :height, :width]

    def mlp_part(self, x: jax.Array) -> jax.Array:  # (B, H, W, D) -> (B, H, W, D), the convolution before it included
        x = self.local_conv(x)
        return x + self.mlp(self.norm2(x))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.mlp_part(self.attention_part(x))


def encoder_stages(config: MobileSamConfig) -> list[tuple[str, nn.Module]]:
    """(parameter key, module) of the whole encoder, in forward order; equal modules share a compilation."""
    stages: list[tuple[str, nn.Module]] = [("patch_embed", PatchEmbed(config.embed_dims[0], parent=None))]
    block = 0
    for layer, (dim, depth) in enumerate(zip(config.embed_dims, config.depths, strict=True)):
        for _ in range(depth):
            stages.append((f"blocks_{block}", make_block(config, layer)))
            block += 1
        if layer + 1 < len(config.embed_dims):
            merge = Merge(dim, config.embed_dims[layer + 1], config.merge_strides[layer], parent=None)
            stages.append((f"merges_{layer}", merge))
    return [*stages, ("neck", Neck(config.embed_dims[-1], config.out_chans, parent=None))]


def make_block(config: MobileSamConfig, layer: int) -> ConvBlock | AttentionBlock:
    """A block of a layer."""
    dim = config.embed_dims[layer]
    if layer == 0:
        return ConvBlock(dim, int(dim * config.expand_ratio), parent=None)
    return AttentionBlock(
        dim=dim,
        num_heads=config.num_heads[layer - 1],
        window=config.window_sizes[layer - 1],
        mlp_dim=int(dim * config.mlp_ratio),
        local_kernel=config.local_kernel,
        parent=None,
    )


def stage_graph(config: MobileSamConfig) -> StageGraph:
    """The encoder as a chain of stages; what it is `EMBEDDED` with are the images themselves."""
    stages, before = [], EMBEDDED
    for key, module in encoder_stages(config):
        stages.append(Stage(key, f"image_encoder/{key}/", module, (before,)))
        before = key
    return StageGraph(tuple(stages), (before,))


class TinyVit(nn.Module):
    """Images to embeddings."""

    config: MobileSamConfig

    def setup(self) -> None:
        for key, module in encoder_stages(self.config):
            setattr(self, key, module)

    def __call__(self, x: jax.Array) -> jax.Array:  # (B, S, S, 3) -> (B, g, g, C)
        for key, _ in encoder_stages(self.config):
            x = getattr(self, key)(x)
        return x
