"""Hiera and its pyramid neck, the image encoder of SAM 2 (facebookresearch/sam2, modeling/backbones).

Four stages of blocks, each at half the grid of the one before: the first block of a stage pools its queries inside
their windows. The neck takes the outputs of all four. What leaves it are the features that the mask decoder takes, with
the offset that stands for "no memory", so that an image is a video of one frame.
"""

import dataclasses
from itertools import accumulate
from typing import Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sam_flax.config import SegmenterConfig
from sam_flax.convolutions import StridedConv
from sam_flax.encoders.attention import attention
from sam_flax.encoders.vit import split_heads, window_unpartition
from sam_flax.errors import InputError
from sam_flax.layers import Linear, MLPBlock, Site, layer_norm
from sam_flax.stages import EMBEDDED, Stage, StageGraph

LEVELS = 4  # grids of the pyramid, at 4, 8, 16 and 32 pixels a token
PATCH_KERNEL, PATCH_STRIDE = 7, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sam2Config(SegmenterConfig):
    """Everything that fixes the computation graph of a SAM 2 on images.

    Raises:
        InputError: if the lists have not four entries, or a size does not divide where it must.
    """

    family: ClassVar[str] = "sam2"
    resize: ClassVar[Literal["pad", "squash"]] = "squash"
    logit_limit: ClassVar[float | None] = 32.0

    embed_dim: int  # width of the first stage; each further one is twice as wide
    num_heads: int  # of the first stage; each further one has twice as many
    depths: tuple[int, ...]  # blocks of each stage
    window_sizes: tuple[int, ...]  # of each stage, tokens
    global_attn_indexes: tuple[int, ...]  # blocks, counted through all stages, that attend globally
    background_size: int  # side of the table of positions that is stretched over the grid
    mlp_ratio: float = 4.0
    stability_delta: float = 0.05  # how far from 0 logits are cut to see whether a single mask is stable
    stability_threshold: float = 0.98  # IoU of the two cuts below which the best of several is given instead; 0: never

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.depths) != LEVELS or len(self.window_sizes) != LEVELS:
            raise InputError(f"SAM 2 has {LEVELS} stages; give as many depths and window_sizes.")
        if self.embed_dim % self.num_heads:
            raise InputError(f"embed_dim={self.embed_dim} is not a multiple of num_heads={self.num_heads}; change one.")
        if self.patch_size != 16 or self.img_size % 32:
            raise InputError(f"SAM 2 has patch_size 16 and an img_size that is a multiple of 32, not {self.img_size}.")
        if (self.img_size // PATCH_STRIDE) % self.window_sizes[0]:
            raise InputError(
                f"The first grid, {self.img_size // PATCH_STRIDE} tokens wide, must be whole windows of "
                f"{self.window_sizes[0]} tokens; change img_size or window_sizes."
            )
        pooled = [first for first in self.first_blocks()[1:] if first in self.global_attn_indexes]
        if pooled or any(window % 2 for window in self.window_sizes[:-1]):
            raise InputError("Blocks that pool their queries attend in windows of even size; change the configuration.")
        if any(not 0 <= i < sum(self.depths) for i in self.global_attn_indexes):
            raise InputError(f"global_attn_indexes={self.global_attn_indexes} must be among {sum(self.depths)} blocks.")

    def layers(self) -> int:
        return max(sum(self.depths), super().layers())

    def first_blocks(self) -> tuple[int, ...]:
        """The first block of each stage."""
        return (0, *accumulate(self.depths[:-1]))

    def width(self, stage: int) -> int:
        """Channels in a stage."""
        return self.embed_dim << stage


def _published(
    embed_dim: int, heads: int, depths: tuple[int, ...], windows: tuple[int, ...], blocks: tuple[int, ...], side: int
) -> Sam2Config:
    return Sam2Config(
        img_size=1024,
        patch_size=16,
        embed_dim=embed_dim,
        num_heads=heads,
        depths=depths,
        window_sizes=windows,
        global_attn_indexes=blocks,
        background_size=side,
    )


# configs/sam2.1/*.yaml, and the same for SAM 2.0.
SAM2_TINY = _published(96, 1, (1, 2, 7, 2), (8, 4, 14, 7), (5, 7, 9), 7)
SAM2_SMALL = _published(96, 1, (1, 2, 11, 2), (8, 4, 14, 7), (7, 10, 13), 7)
SAM2_BASE_PLUS = _published(112, 2, (2, 3, 16, 3), (8, 4, 14, 7), (12, 16, 20), 14)
SAM2_LARGE = _published(144, 2, (2, 6, 36, 4), (8, 4, 16, 8), (23, 33, 43), 7)
SAM2_CONFIGS = {"tiny": SAM2_TINY, "small": SAM2_SMALL, "base_plus": SAM2_BASE_PLUS, "large": SAM2_LARGE}


class Features(NamedTuple):
    """What the mask decoder takes of an image, (B, side, side, channels): at 16, 4 and 8 pixels a token."""

    embedding: jax.Array  # C channels
    quarter: jax.Array  # C / 8
    eighth: jax.Array  # C / 4


def cubic_matrix(new: int, old: int) -> np.ndarray:
    """(new, old) float32 matrix of bicubic resampling, half-pixel centres, clamped edges, a = -0.75.

    The same weights as `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`.
    """
    a = -0.75
    position = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(position).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        distance = np.abs(position - (first + tap))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(distance <= 1, near, far))
    return matrix.astype(np.float32)


class PatchEmbed(nn.Module):
    """Image to tokens of four pixels, with positions: a small table stretched over the grid and one for each window."""

    embed_dim: int
    background_size: int
    window: int

    def setup(self) -> None:
        self.proj = StridedConv(3, self.embed_dim, PATCH_KERNEL, PATCH_STRIDE, PATCH_KERNEL // 2)
        self.bias = self.param("bias", nn.initializers.zeros, (self.embed_dim,))
        side, small = self.background_size, nn.initializers.normal(0.02)
        self.pos_embed = self.param("pos_embed", small, (1, side, side, self.embed_dim))
        self.pos_embed_window = self.param("pos_embed_window", small, (1, self.window, self.window, self.embed_dim))

    def __call__(self, x: jax.Array) -> jax.Array:  # (B, S, S, 3) -> (B, S/4, S/4, D)
        x = self.proj(x) + self.bias
        rows, cols = (cubic_matrix(side, self.background_size) for side in x.shape[1:3])
        positions = jnp.einsum("ri,bijd,cj->brcd", rows, self.pos_embed, cols)
        times = (1, x.shape[1] // self.window, x.shape[2] // self.window, 1)
        return x + positions + jnp.tile(self.pos_embed_window, times)


def pooled(x: jax.Array) -> jax.Array:
    """(..., H, W, D) -> (..., H/2, W/2, D), the largest of every four."""
    *batch, height, width, channels = x.shape
    return x.reshape(*batch, height // 2, 2, width // 2, 2, channels).max(axis=(-4, -2))


class Attention(nn.Module):
    """Self-attention in windows, or globally; with `pool` every four queries are one, the largest of each channel."""

    dim: int
    features: int
    num_heads: int
    window: int  # tokens; 0 is all of the grid
    pool: bool

    def setup(self) -> None:
        self.qkv = Linear(self.dim, 3 * self.features)
        self.proj = Linear(self.features, self.features)
        self.q, self.k, self.v, self.softmax = Site(), Site(), Site(), Site()
        self.operands = Site()

    def split(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(B, H, W, D) -> queries (B*windows, heads, M, d), keys and values (B*windows, heads, N, d)."""
        side = self.windows(x.shape[1:3])
        parts = split_heads(self.qkv.product(x), self.qkv.bias, side, self.num_heads)
        q, k, v = (part.reshape(-1, self.num_heads, *part.shape[1:]) for part in parts)
        if self.pool:
            q = pooled(q.reshape(*q.shape[:2], *side, q.shape[-1]))
            q = q.reshape(*q.shape[:2], -1, q.shape[-1])
        return q, k, v

    def windows(self, grid: tuple[int, ...]) -> tuple[int, int]:
        """(rows, columns) of a window of keys."""
        return (self.window, self.window) if self.window else (grid[0], grid[1])

    def join(self, out: jax.Array, grid: tuple[int, ...]) -> jax.Array:
        """What the queries attended to, (B*windows, heads, M, d) -> (B, H', W', features), projected."""
        by = 2 if self.pool else 1
        side = tuple(length // by for length in self.windows(grid))
        windows = out.transpose(0, 2, 1, 3).reshape(-1, *side, self.features)
        return self.proj(window_unpartition(windows, (grid[0] // by, grid[1] // by)))

    def __call__(self, x: jax.Array) -> jax.Array:  # (B, H, W, D) -> (B, H', W', features)
        q, k, v = self.split(x)
        q, k, v = self.q(q), self.k(k), self.v(v)
        q, k, v = self.operands((q * q.shape[-1] ** -0.5, k, v))
        return self.join(attention(q, k, v, self.softmax), x.shape[1:3])


class Block(nn.Module):
    """Pre-norm transformer block; the first of a stage is twice as wide behind it, and may pool (MultiScaleBlock)."""

    dim: int
    features: int
    num_heads: int
    mlp_dim: int
    window: int
    pool: bool

    def setup(self) -> None:
        self.norm1, self.norm2 = layer_norm(), layer_norm()
        self.attn = Attention(self.dim, self.features, self.num_heads, self.window, self.pool)
        self.mlp = MLPBlock(self.features, self.mlp_dim)
        if self.dim != self.features:
            self.proj = Linear(self.dim, self.features)

    def attention_part(self, x: jax.Array) -> jax.Array:  # (B, H, W, D) -> (B, H', W', features), residual included
        normed = self.norm1(x)
        if self.dim != self.features:
            x = self.proj(normed)
            x = pooled(x) if self.pool else x
        return x + self.attn(normed)

    def mlp_part(self, x: jax.Array) -> jax.Array:  # (B, H, W, features) -> (B, H, W, features), residual included
        return x + self.mlp(self.norm2(x))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.mlp_part(self.attention_part(x))


class PyramidNeck(nn.Module):
    """All levels at the decoder's width; the third has the fourth added to it, the first two are made narrower.

    The fourth goes no further. `convs_i` is of level i, the first the finest.
    """

    widths: tuple[int, ...]
    out_chans: int

    def setup(self) -> None:
        c = self.out_chans
        self.convs = [Linear(width, c) for width in self.widths]
        self.high_res = [Linear(c, c // 8), Linear(c, c // 4)]  # conv_s0 and conv_s1 of the official decoder

    @nn.compact  # and not in `setup`, so that the other two outputs are computed without this parameter
    def embedding(self, third: jax.Array, fourth: jax.Array) -> jax.Array:  # -> (B, g, g, C)
        no_mem_embed = self.param("no_mem_embed", nn.initializers.normal(0.02), (self.out_chans,))
        upsampled = jnp.repeat(jnp.repeat(self.convs[3](fourth), 2, axis=1), 2, axis=2)
        return self.convs[2](third) + upsampled + no_mem_embed

    def quarter(self, first: jax.Array) -> jax.Array:  # -> (B, 4g, 4g, C/8)
        return self.high_res[0](self.convs[0](first))

    def eighth(self, second: jax.Array) -> jax.Array:  # -> (B, 2g, 2g, C/4)
        return self.high_res[1](self.convs[1](second))

    def __call__(self, *levels: jax.Array) -> Features:
        first, second, third, fourth = levels
        return Features(self.embedding(third, fourth), self.quarter(first), self.eighth(second))


def make_block(config: Sam2Config, index: int) -> Block:
    """Block `index`, counted through all stages; equal blocks share a compilation."""
    firsts = config.first_blocks()
    stage = sum(first <= index for first in firsts) - 1
    leads = index in firsts[1:]  # it still works on the grid, and in the windows, of the stage before
    features = config.width(stage)
    return Block(
        dim=config.width(stage - leads),
        features=features,
        num_heads=config.num_heads << stage,
        mlp_dim=int(features * config.mlp_ratio),
        window=0 if index in config.global_attn_indexes else config.window_sizes[stage - leads],
        pool=leads,
        parent=None,
    )


def encoder_stages(config: Sam2Config) -> list[tuple[str, nn.Module, tuple[str, ...]]]:
    """(parameter key, module, keys of its inputs) of the whole encoder, in forward order."""
    embed = PatchEmbed(config.embed_dim, config.background_size, config.window_sizes[0], parent=None)
    stages: list[tuple[str, nn.Module, tuple[str, ...]]] = [("patch_embed", embed, (EMBEDDED,))]
    for index in range(sum(config.depths)):
        stages.append((f"blocks_{index}", make_block(config, index), (stages[-1][0],)))
    last = tuple(f"blocks_{end - 1}" for end in accumulate(config.depths))
    widths = tuple(config.width(stage) for stage in range(LEVELS))
    return [*stages, ("neck", PyramidNeck(widths, config.out_chans, parent=None), last)]


def stage_graph(config: Sam2Config) -> StageGraph:
    """The encoder as a graph whose neck takes the last block of every stage; it is `EMBEDDED` with the images."""
    stages = [Stage(key, f"image_encoder/{key}/", module, inputs) for key, module, inputs in encoder_stages(config)]
    return StageGraph(tuple(stages), ("neck",))


class Hiera(nn.Module):
    """Images to features."""

    config: Sam2Config

    def setup(self) -> None:
        for key, module, _ in encoder_stages(self.config):
            setattr(self, key, module)

    def __call__(self, x: jax.Array) -> Features:  # (B, S, S, 3)
        def apply(stage: Stage, inputs: tuple[Any, ...]) -> Any:
            return getattr(self, stage.key)(*inputs)

        return stage_graph(self.config).run(x, apply)
