"""The two-way transformer and the mask decoder (modeling/transformer.py, modeling/mask_decoder.py)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sam_flax.config import SegmenterConfig
from sam_flax.layers import MLP, Linear, MLPBlock, Site, UpConv, gelu, layer_norm


class Attention(nn.Module):
    """Multi-head attention with separate projections, optionally narrower inside."""

    embedding_dim: int
    num_heads: int
    downsample_rate: int = 1

    def setup(self) -> None:
        inner = self.embedding_dim // self.downsample_rate
        self.q_proj, self.k_proj, self.v_proj = (Linear(self.embedding_dim, inner) for _ in range(3))
        self.out_proj = Linear(inner, self.embedding_dim)
        self.q, self.k, self.v, self.softmax = Site(), Site(), Site(), Site()
        self.operands = Site()

    def separate_heads(self, x: Float[Array, "n t c"]) -> Float[Array, "n {self.num_heads} t c//{self.num_heads}"]:
        return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(0, 2, 1, 3)

    def __call__(
        self, q: Float[Array, "n queries c"], k: Float[Array, "n keys c"], v: Float[Array, "n keys c"]
    ) -> Float[Array, "n queries c"]:
        q = self.q(self.separate_heads(self.q_proj(q)))
        k = self.k(self.separate_heads(self.k_proj(k)))
        v = self.v(self.separate_heads(self.v_proj(v)))
        q, k, v = self.operands((q * q.shape[-1] ** -0.5, k, v))
        out = self.softmax(nn.softmax(q @ k.transpose(0, 1, 3, 2))) @ v
        out = out.transpose(0, 2, 1, 3).reshape(out.shape[0], out.shape[2], -1)
        return self.out_proj(out)


class TwoWayAttentionBlock(nn.Module):
    """Tokens attend to themselves and to the image, then the image attends to the tokens."""

    embedding_dim: int
    num_heads: int
    mlp_dim: int
    skip_first_layer_pe: bool

    def setup(self) -> None:
        dim, heads = self.embedding_dim, self.num_heads
        self.self_attn = Attention(dim, heads)
        self.cross_attn_token_to_image = Attention(dim, heads, downsample_rate=2)
        self.mlp = MLPBlock(dim, self.mlp_dim, nn.relu)
        self.cross_attn_image_to_token = Attention(dim, heads, downsample_rate=2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (layer_norm(1e-5) for _ in range(4))

    def __call__(
        self,
        queries: Float[Array, "n t c"],
        keys: Float[Array, "n hw c"],
        query_pe: Float[Array, "n t c"],
        key_pe: Float[Array, "n hw c"],
    ) -> tuple[Float[Array, "n t c"], Float[Array, "n hw c"]]:
        if self.skip_first_layer_pe:
            queries = self.self_attn(queries, queries, queries)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries)
        queries = self.norm1(queries)

        k = keys + key_pe
        queries = self.norm2(queries + self.cross_attn_token_to_image(queries + query_pe, k, keys))
        queries = self.norm3(queries + self.mlp(queries))
        keys = self.norm4(keys + self.cross_attn_image_to_token(k, queries + query_pe, queries))
        return queries, keys


class TwoWayTransformer(nn.Module):
    """`depth` two-way blocks and a last attention from tokens to image."""

    depth: int
    embedding_dim: int
    num_heads: int
    mlp_dim: int

    def setup(self) -> None:
        self.layers = [
            TwoWayAttentionBlock(self.embedding_dim, self.num_heads, self.mlp_dim, skip_first_layer_pe=i == 0)
            for i in range(self.depth)
        ]
        self.final_attn_token_to_image = Attention(self.embedding_dim, self.num_heads, downsample_rate=2)
        self.norm_final_attn = layer_norm(1e-5)

    def __call__(
        self, image: Float[Array, "n hw c"], image_pe: Float[Array, "n hw c"], tokens: Float[Array, "n t c"]
    ) -> tuple[Float[Array, "n t c"], Float[Array, "n hw c"]]:
        queries, keys = tokens, image
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, image_pe)
        attended = self.final_attn_token_to_image(queries + tokens, keys + image_pe, keys)
        return self.norm_final_attn(queries + attended), keys


class OutputUpscaling(nn.Module):
    """Image tokens to mask features at four times the resolution, an eighth of the channels."""

    dim: int

    def setup(self) -> None:
        self.conv1, self.norm1 = UpConv(self.dim, self.dim // 4), layer_norm()
        self.conv2 = UpConv(self.dim // 4, self.dim // 8)

    def __call__(self, x: Float[Array, "n g g c"]) -> Float[Array, "n 4*g 4*g c//8"]:
        return gelu(self.conv2(gelu(self.norm1(self.conv1(x)))))


class MaskDecoder(nn.Module):
    """Image embedding and prompt embeddings to mask logits and predicted IoU."""

    config: SegmenterConfig

    def setup(self) -> None:
        c = self.config
        dim, num_masks = c.out_chans, c.num_multimask_outputs + 1
        normal = nn.initializers.normal(1.0)
        self.transformer = TwoWayTransformer(c.decoder_depth, dim, c.decoder_num_heads, c.decoder_mlp_dim)
        self.iou_token = self.param("iou_token", normal, (1, dim))
        self.mask_tokens = self.param("mask_tokens", normal, (num_masks, dim))
        self.output_upscaling = OutputUpscaling(dim)
        self.output_hypernetworks_mlps = [MLP(dim, dim, dim // 8, 3) for _ in range(num_masks)]
        self.iou_prediction_head = MLP(dim, c.iou_head_hidden_dim, num_masks, c.iou_head_depth)

    def __call__(
        self,
        image_embeddings: Float[Array, "images g g c"],
        image_pe: Float[Array, "1 g g c"],
        sparse: Float[Array, "n t c"],
        dense: Float[Array, "n g g c"],
    ) -> tuple[Float[Array, "n masks 4*g 4*g"], Float[Array, "n masks"]]:
        """All masks of N prompts, the single-mask output first.

        Args:
            image_embeddings: one for all prompts, or one for each.
            image_pe: positional encoding of the image's tokens.
            sparse: embeddings of points and boxes, t tokens for each prompt.
            dense: embeddings of mask prompts.

        Returns:
            Logits and predicted IoU of 1 + `num_multimask_outputs` masks.
        """
        n, g, _, dim = dense.shape
        outputs = jnp.concatenate([self.iou_token, self.mask_tokens])
        tokens = jnp.concatenate([jnp.broadcast_to(outputs, (n, *outputs.shape)), sparse], axis=1)
        image = (image_embeddings + dense).reshape(n, g * g, dim)
        pe = jnp.broadcast_to(image_pe.reshape(1, g * g, dim), image.shape)
        tokens, image = self.transformer(image, pe, tokens)

        num_masks = len(self.output_hypernetworks_mlps)
        upscaled = self.output_upscaling(image.reshape(n, g, g, dim))  # (N, 4g, 4g, C/8)
        hyper = jnp.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], axis=1)
        logits = jnp.einsum("nmc,nhwc->nmhw", hyper, upscaled)
        return logits, self.iou_prediction_head(tokens[:, 0])[:, :num_masks]
