"""The ViT image encoder with windowed and global attention (modeling/image_encoder.py)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from sam_flax.config import SamConfig
from sam_flax.layers import Conv, Linear, MLPBlock, PatchConv, Site, layer_norm

# Attention maps larger than this are never held whole.
MAX_ATTENTION_BYTES = 64 * 2**20
# On a CPU parts of this size stay in the cache of a core, which makes them twice as fast; smaller maps are not split.
CPU_PART_BYTES = 2 * 2**20
CPU_WHOLE_BYTES = 8 * 2**20
QUERY_CHUNK = 256


def split_heads(
    qkv: Float[Array, "b h w qkv"], bias: Float[Array, " qkv"], window: tuple[int, int], heads: int
) -> tuple[Float[Array, "g n head"], Float[Array, "g n head"], Float[Array, "g n head"]]:
    """Products of the qkv projection -> queries, keys and values, with g = b * windows * heads, the bias added.

    Windows of n = height * width tokens, zero-padded before the bias; each of the three in one transposition.
    """
    b, height, width, _ = qkv.shape
    h, w = window
    rows, cols = -(-height // h), -(-width // w)

    def split(part: Array, bias: Array) -> Array:
        part = jnp.pad(part, ((0, 0), (0, -height % h), (0, -width % w), (0, 0)))
        part = part.reshape(b, rows, h, cols, w, heads, -1).transpose(0, 1, 3, 5, 2, 4, 6)
        return (part + bias.reshape(heads, 1, 1, -1)).reshape(b * rows * cols * heads, h * w, -1)

    q, k, v = (split(*both) for both in zip(jnp.split(qkv, 3, axis=-1), jnp.split(bias, 3), strict=True))
    return q, k, v


def window_unpartition(
    windows: Float[Array, "windows height width c"], hw: tuple[int, int]
) -> Float[Array, "b {hw[0]} {hw[1]} c"]:
    """Windows in rows -> the grids that they cover, with their padding cut."""
    _, height, width, c = windows.shape
    h, w = hw
    rows, cols = -(-h // height), -(-w // width)
    x = windows.reshape(-1, rows, cols, height, width, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, rows * height, cols * width, c)[:, :h, :w]


def relative_scores(q: Float[Array, "*batch n c"], table: Float[Array, "positions c"]) -> Float[Array, "*batch n n"]:
    """Products of queries with the relative positions of all keys on their line.

    One product with the table and a shift: a matrix of positions for every query would make small, slow products.

    Args:
        q: queries of lines of n tokens.
        table: 2 * n - 1 positions; entry i - j + n - 1 belongs to query i and key j.

    Raises:
        ValueError: if the table is for another n.
    """
    n = q.shape[-2]
    if len(table) != 2 * n - 1:
        raise ValueError(
            f"A table of {len(table)} relative positions is for a grid {(len(table) + 1) // 2} tokens wide, "
            f"not {n}; apply the block to the grid that it was made for."
        )
    # (..., n, 2n): what is for key j of query i lies at column n - 1 - i + j. Rows that are one shorter undo the -i.
    products = q @ jnp.pad(table[::-1], ((0, 1), (0, 0))).T
    lines = products.reshape(*q.shape[:-2], 2 * n * n)[..., n - 1 : 2 * n * n - 1]
    return lines.reshape(*q.shape[:-1], 2 * n - 1)[..., :n]


def relative_biases(
    q: Float[Array, "g n c"], table_h: Float[Array, "_ c"], table_w: Float[Array, "_ c"], hw: tuple[int, int]
) -> tuple[Float[Array, "g n {hw[0]}"], Float[Array, "g n {hw[1]}"]]:
    """Biases of queries, n = height * width of them, on the rows and on the columns of keys."""
    groups, n, _ = q.shape
    grid = q.reshape(groups, *hw, -1)
    bias_h = relative_scores(grid.swapaxes(1, 2), table_h).swapaxes(1, 2)
    return bias_h.reshape(groups, n, -1), relative_scores(grid, table_w).reshape(groups, n, -1)


def attention_probabilities(
    q: Float[Array, "*g m d"],
    k: Float[Array, "*g n d"],
    bias_h: Float[Array, "*g m h"],
    bias_w: Float[Array, "*g m w"],
) -> Float[Array, "*g m n"]:
    """Softmax over all keys, n = h * w of them, for any m of the queries; operands as in `attention`."""
    weights, total = attention_weights(q, k, bias_h, bias_w)
    return weights / total


def attention_weights(
    q: Float[Array, "*g m d"],
    k: Float[Array, "*g n d"],
    bias_h: Float[Array, "*g m h"],
    bias_w: Float[Array, "*g m w"],
) -> tuple[Float[Array, "*g m n"], Float[Array, "*g m 1"]]:
    """`attention_probabilities` before their division, and what to divide by."""
    return weights_of_scores(q @ jnp.swapaxes(k, -1, -2), bias_h, bias_w)


def weights_of_scores(
    scores: Float[Array, "*g m n"], *biases: Float[Array, "*g m _"]
) -> tuple[Float[Array, "*g m n"], Float[Array, "*g m 1"]]:
    """`attention_weights` of products that are made already, with both biases or none."""
    bias_h, bias_w = biases or (None, None)
    grid = scores[..., None, :]
    if bias_h is not None and bias_w is not None:
        grid = scores.reshape(*scores.shape[:-1], bias_h.shape[-1], bias_w.shape[-1])
        grid = grid + bias_h[..., :, None] + bias_w[..., None, :]
    largest = jax.lax.stop_gradient(jnp.max(grid, axis=(-2, -1), keepdims=True))
    weights = jnp.exp(grid - largest)
    # Summed over rows first, which XLA's CPU code does many columns at a time; it would join the two sums to one.
    columns = jax.lax.optimization_barrier(jnp.sum(weights, axis=-2))
    return weights.reshape(scores.shape), jnp.sum(columns, axis=-1, keepdims=True)


def attention(
    q: Float[Array, "g n d"],
    k: Float[Array, "g n d"],
    v: Float[Array, "g n d"],
    bias_h: Float[Array, "g n h"],
    bias_w: Float[Array, "g n w"],
    softmax_site: Callable[[Array], Array],
) -> Float[Array, "g n d"]:
    """Softmax attention with a decomposed relative-position bias, in bounded memory.

    Args:
        q: queries, already scaled; g counts batch and heads, n = h * w tokens.
        k: keys.
        v: values.
        bias_h: bias of each query on each row of keys.
        bias_w: bias of each query on each column of keys.
        softmax_site: called on attention probabilities (..., n); where it gives back the very array that it was
            given, values are weighted first and divided after.
    """

    def attend(part: tuple[Array, ...]) -> Array:
        q, k, v, bh, bw = part
        weights, total = attention_weights(q, k, bh, bw)
        probabilities = weights / total
        seen = softmax_site(probabilities)
        if seen is probabilities:  # as they were: to divide the few products is less work
            return (weights @ v) / total
        return seen @ v

    return attend_in_parts(attend, q, k, v, bias_h, bias_w)


def attend_in_parts(
    attend: Callable[[tuple[Array, ...]], Any],
    q: Real[Array, "g n d"],
    k: Real[Array, "g _ _"],
    v: Real[Array, "g n d"],
    bias_h: Real[Array, "g n h"],
    bias_w: Real[Array, "g n w"],
) -> Any:
    """`attend` on all of its operands, shaped as in `attention`, in parts where the map would be large.

    Args:
        attend: operands of some of the g, and of some of their queries, (..., m, d) and so on, to arrays (..., m, any).
        q, k, v, bias_h, bias_w: as in `attention`; k as `attend` takes it.

    Returns:
        What `attend` returns on all.
    """
    groups, n, _ = q.shape
    one_map = n * n * bias_h.dtype.itemsize  # queries may be levels of one byte, which their products are not
    whole, part = _attention_bytes()
    if groups * one_map <= whole:
        return attend((q, k, v, bias_h, bias_w))

    # A gradient, too, holds a part at a time of what would be large.
    attend_part = attend if groups * one_map <= MAX_ATTENTION_BYTES else jax.checkpoint(attend)
    together = max(g for g in range(1, groups + 1) if groups % g == 0 and (g == 1 or g * one_map <= part))
    if together > 1 or one_map <= part:
        parts = tuple(a.reshape(groups // together, together, *a.shape[1:]) for a in (q, k, v, bias_h, bias_w))
        return jax.tree.map(lambda a: a.reshape(groups, n, -1), jax.lax.map(attend_part, parts))

    # One head's map. Where its queries fall into no whole chunks, it is made at once as long as it may be.
    chunk = QUERY_CHUNK if n % QUERY_CHUNK == 0 or one_map > MAX_ATTENTION_BYTES else n
    whole_chunks = n - n % chunk

    def one_head(head: tuple[Array, ...]) -> Any:
        q, k, v, bh, bw = head
        chunks = [a[:whole_chunks].reshape(-1, chunk, a.shape[-1]) for a in (q, bh, bw)]
        out = jax.lax.map(lambda c: attend_part((c[0], k, v, c[1], c[2])), chunks)
        out = jax.tree.map(lambda a: a.reshape(whole_chunks, -1), out)
        if whole_chunks == n:
            return out
        rest = attend_part((q[whole_chunks:], k, v, bh[whole_chunks:], bw[whole_chunks:]))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, rest)

    return jax.lax.map(one_head, (q, k, v, bias_h, bias_w))


def _attention_bytes() -> tuple[int, int]:
    """Size up to which attention maps are made at once, and of the parts that larger ones are made in."""
    if jax.default_backend() == "cpu":
        return CPU_WHOLE_BYTES, CPU_PART_BYTES
    return MAX_ATTENTION_BYTES, MAX_ATTENTION_BYTES


class Attention(nn.Module):
    """Multi-head self-attention on a grid of tokens, whole or in windows, with decomposed relative positions."""

    dim: int
    num_heads: int
    size: int  # side of the token grid it attends over
    windowed: bool = False  # whether that is a window of the grid it is given

    def setup(self) -> None:
        head_dim = self.dim // self.num_heads
        self.qkv = Linear(self.dim, 3 * self.dim)
        self.proj = Linear(self.dim, self.dim)
        shape = (2 * self.size - 1, head_dim)
        self.rel_pos_h = self.param("rel_pos_h", nn.initializers.zeros, shape)
        self.rel_pos_w = self.param("rel_pos_w", nn.initializers.zeros, shape)
        self.q, self.k, self.v, self.softmax = Site(), Site(), Site(), Site()
        # Sees everything that makes the attention map, which itself may never exist whole.
        self.operands = Site()

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        grid = (x.shape[1], x.shape[2])
        # The padding of windows is zeros before the projection: what comes of it is the bias alone.
        h, w = (self.size, self.size) if self.windowed else grid
        q, k, v = split_heads(self.qkv.product(x), self.qkv.bias, (h, w), self.num_heads)
        q, k, v = self.q(q), self.k(k), self.v(v)
        biases = relative_biases(q, self.rel_pos_h, self.rel_pos_w, (h, w))
        operands = self.operands((q * q.shape[-1] ** -0.5, k, v, *biases))
        out = attention(*operands, self.softmax)
        out = out.reshape(-1, self.num_heads, h, w, out.shape[-1]).transpose(0, 2, 3, 1, 4)
        return self.proj(window_unpartition(out.reshape(-1, h, w, self.dim), grid))


class Block(nn.Module):
    """Pre-norm transformer block; `window` > 0 attends in windows, 0 globally."""

    dim: int
    num_heads: int
    mlp_dim: int
    window: int
    grid: int

    def setup(self) -> None:
        self.norm1, self.norm2 = layer_norm(), layer_norm()
        self.attn = Attention(self.dim, self.num_heads, self.window or self.grid, windowed=self.window > 0)
        self.mlp = MLPBlock(self.dim, self.mlp_dim)

    def attention_part(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """The first half, residual included."""
        return x + self.attn(self.norm1(x))

    def mlp_part(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """The second half, residual included."""
        return x + self.mlp(self.norm2(x))

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        return self.mlp_part(self.attention_part(x))


class PatchEmbed(nn.Module):
    """Image to tokens."""

    patch_size: int
    embed_dim: int

    def setup(self) -> None:
        self.proj = PatchConv(3, self.embed_dim, self.patch_size)

    def __call__(self, x: Float[Array, "b s s 3"]) -> Float[Array, "b g g {self.embed_dim}"]:
        return self.proj(x)


class Neck(nn.Module):
    """1x1 and 3x3 convolution with norms: encoder width to embedding width."""

    embed_dim: int
    out_chans: int

    def setup(self) -> None:
        self.conv1, self.norm1 = Conv(self.embed_dim, self.out_chans, 1), layer_norm()
        self.conv2, self.norm2 = Conv(self.out_chans, self.out_chans, 3), layer_norm()

    def __call__(self, x: Float[Array, "b g g d"]) -> Float[Array, "b g g {self.out_chans}"]:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))))


def make_block(config: SamConfig, index: int) -> Block:
    """Encoder block `index`; blocks of one kind are equal objects: one compilation serves them all."""
    return Block(
        dim=config.embed_dim,
        num_heads=config.num_heads,
        mlp_dim=int(config.embed_dim * config.mlp_ratio),
        window=config.block_window(index),
        grid=config.grid,
        parent=None,
    )


class ImageEncoderViT(nn.Module):
    """Images to embeddings; the stages (`embed`, `blocks`, `neck`) can also be applied one by one."""

    config: SamConfig

    def setup(self) -> None:
        c = self.config
        self.patch_embed = PatchEmbed(c.patch_size, c.embed_dim)
        self.pos_embed = self.param("pos_embed", nn.initializers.normal(0.02), (1, c.grid, c.grid, c.embed_dim))
        self.blocks = [make_block(c, i) for i in range(c.depth)]
        self.neck = Neck(c.embed_dim, c.out_chans)

    def __call__(self, x: Float[Array, "b s s 3"]) -> Float[Array, "b g g {self.config.out_chans}"]:
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.neck(x)
