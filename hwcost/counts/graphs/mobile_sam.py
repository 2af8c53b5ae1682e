"""The graph of MobileSAM as layers: TinyViT, then SAM's own decoder.

A batch norm is folded into its convolution, whose offset it leaves. Windows are padded to whole ones before the norm,
so that all layers of an attention see the padding.
"""

from hwcost.counts.builder import GELU_OPS, Builder
from hwcost.counts.costs import Gemm, Tensor
from hwcost.counts.graphs import sam_vit
from sam_flax.encoders.tiny_vit import MobileSamConfig

UNMODELLED = sam_vit.UNMODELLED


def add_layers(b: Builder, c: MobileSamConfig, prompts: int) -> None:
    """Adds the encoder's layers, then the decoder's for `prompts` boxes."""
    b.part = "encoder"
    dim = c.embed_dims[0]
    embed, side = "image_encoder/patch_embed", c.img_size // 2
    conv(b, f"{embed}/conv1", side, 3, dim // 2, 3, act=True)
    conv(b, f"{embed}/conv2", side // 2, dim // 2, dim, 3, arrives=side**2 * dim // 2)
    block = 0
    for layer, (dim, depth) in enumerate(zip(c.embed_dims, c.depths, strict=True)):
        side = c.layer_grid(layer)
        for _ in range(depth):
            path = f"image_encoder/blocks_{block}"
            if layer:
                _attention_block(b, c, path, layer, side)
            else:
                _conv_block(b, path, side, dim, int(dim * c.expand_ratio))
            block += 1
        if layer + 1 < len(c.embed_dims):
            wide, after = c.embed_dims[layer + 1], c.layer_grid(layer + 1)
            path = f"image_encoder/merges_{layer}"
            conv(b, f"{path}/conv1", side, dim, wide, 1, act=True)
            depthwise(b, f"{path}/conv2", after, wide, 3, arrives=side**2 * wide, act=True)
            conv(b, f"{path}/conv3", after, wide, wide, 1)
    sam_vit.neck(b, c.grid, c.embed_dims[-1], c.out_chans)
    sam_vit.decoder(b, c, prompts)


def conv(
    b: Builder, path: str, side: int, channels: int, features: int, k: int, *, arrives: int = 0, act: bool = False
) -> None:
    """A convolution of `ConvNorm`, whose output is `side` pixels wide; `arrives` counts its input's numbers."""
    site, kernel = f"{path}/conv/input", f"{path}/conv"
    a, rows = b.site(site), side**2
    arrives = arrives or (rows * channels if k == 1 else 4 * rows * channels)
    b.product(
        kernel, kernel, "conv", Gemm(rows, k * k * channels, features), a, b.weight(site), a_site=site,
        source=Tensor(arrives, b.float_bits), out_on_chip=True, encodes=0 if a.is_float else arrives,
    )  # fmt: skip
    _norm(b, path, rows * features, features, act)


def depthwise(b: Builder, path: str, side: int, channels: int, k: int, *, arrives: int, act: bool = False) -> None:
    """A convolution of every channel by itself: as many products of one column."""
    site, kernel = f"{path}/conv/input", f"{path}/conv"
    a = b.site(site)
    b.product(
        kernel, kernel, "conv", Gemm(side**2, k * k, 1, repeat=channels), a, b.weight(site), a_site=site,
        source=Tensor(arrives, b.float_bits), out_on_chip=True, encodes=0 if a.is_float else arrives,
        parameters=k * k * channels,
    )  # fmt: skip
    _norm(b, path, side**2 * channels, channels, act)


def _norm(b: Builder, path: str, size: int, channels: int, act: bool) -> None:
    """What is left of a batch norm, and the GELU behind it."""
    written = () if act else (size,)
    b.plain(f"{path}/norm", f"{path}/conv", "elementwise", size, 1, parameters=channels, writes=written)
    if act:
        b.plain(f"{path}/gelu", f"{path}/conv", "activation", size, GELU_OPS, transcendentals=size, writes=(size,))


def _conv_block(b: Builder, path: str, side: int, dim: int, hidden: int) -> None:
    rows = side**2
    conv(b, f"{path}/conv1", side, dim, hidden, 1, act=True)
    depthwise(b, f"{path}/conv2", side, hidden, 3, arrives=rows * hidden, act=True)
    conv(b, f"{path}/conv3", side, hidden, dim, 1)
    kernel, size = f"{path}/conv3/conv", rows * dim
    b.plain(f"{path}/residual", kernel, "elementwise", size, 1, reads=(size,))
    b.plain(f"{path}/gelu", kernel, "activation", size, GELU_OPS, transcendentals=size, writes=(size,))


def _attention_block(b: Builder, c: MobileSamConfig, path: str, layer: int, side: int) -> None:
    dim, heads, window = c.embed_dims[layer], c.num_heads[layer - 1], c.window_sizes[layer - 1]
    windows, keys = (-(-side // window)) ** 2, window**2
    tokens, padded = side**2, windows * keys
    attn, stream = f"{path}/attn", (tokens * dim,)
    kernel = f"{attn}/qkv"
    b.norm(f"{path}/norm1", kernel, padded, dim, reads=stream)
    b.linear(kernel, kernel, padded, dim, 3 * dim, a_on_chip=True, out_site=f"{attn}/q")
    b.attention(attn, heads=heads * windows, queries=keys, keys=keys, dim=dim // heads, out_site=f"{attn}/proj/input")
    # One bias for each score, from a table of the distances.
    scores = heads * windows * keys**2
    b.plain(f"{attn}/biases", f"{attn}/core", "elementwise", scores, 1, parameters=heads * keys)
    kernel = f"{attn}/proj"
    b.linear(kernel, kernel, padded, dim, dim, codes_arrive=True, out_on_chip=True)
    b.plain(f"{attn}/residual", kernel, "elementwise", tokens * dim, 1, reads=stream, writes=stream)
    depthwise(b, f"{path}/local_conv", side, dim, c.local_kernel, arrives=tokens * dim)
    sam_vit.mlp(b, path, tokens, dim, int(dim * c.mlp_ratio))
