"""The graph of SAM 2 on images as layers: Hiera and its pyramid neck, then the decoder with its object score."""

from hwcost.counts.builder import Builder
from hwcost.counts.costs import Gemm
from hwcost.counts.graphs import sam_vit
from sam_flax.encoders.hiera import LEVELS, PATCH_KERNEL, PATCH_STRIDE, Sam2Config, make_block

UNMODELLED: tuple[str, ...] = (
    *sam_vit.UNMODELLED,
    "stretching the table of positions over the grid, which is the same for every image (done once)",
    "memory of earlier frames: an image is a video of one frame",
)


def add_layers(b: Builder, c: Sam2Config, prompts: int) -> None:
    """Adds the encoder's layers, then the decoder's for `prompts` boxes."""
    b.part = "encoder"
    side, dim = c.img_size // PATCH_STRIDE, c.embed_dim
    path, size = "image_encoder/patch_embed/proj", side**2 * dim
    patch = Gemm(side**2, 3 * PATCH_KERNEL**2, dim)
    b.product(path, path, "conv", patch, b.float, b.float, bias=dim, out_on_chip=True)
    b.plain("image_encoder/pos_embed", path, "elementwise", size, 2, parameters=size, writes=(size,))
    for index in range(sum(c.depths)):
        side = _block(b, c, index, side)
    _neck(b, c)
    sam_vit.decoder(b, c, prompts)


def _block(b: Builder, c: Sam2Config, index: int, side: int) -> int:
    """Adds a block on a grid of this side; returns the side behind it."""
    block, path = make_block(c, index), f"image_encoder/blocks_{index}"
    dim, features, heads = block.dim, block.features, block.num_heads
    rows, after = side**2, side // (2 if block.pool else 1)
    window = block.window or side
    windows, keys = (-(-side // window)) ** 2, window**2
    attn, stream = f"{path}/attn", (after**2 * features,)
    kernel = f"{attn}/qkv"
    b.norm(f"{path}/norm1", kernel, rows, dim, reads=(rows * dim,))
    if dim != features:
        shortcut = f"{path}/proj"
        b.linear(shortcut, shortcut, rows, dim, features, out_on_chip=True)
        b.plain(f"{path}/pool", shortcut, "elementwise", 3 * after**2 * features, 1, writes=stream)
    b.linear(kernel, kernel, rows, dim, 3 * features, a_on_chip=True, out_site=f"{attn}/q")
    queries = keys // 4 if block.pool else keys
    if block.pool:
        size = windows * queries * features
        b.plain(f"{attn}/pool", kernel, "elementwise", 3 * size, 1)
    b.attention(
        attn, heads=heads * windows, queries=queries, keys=keys, dim=features // heads, out_site=f"{attn}/proj/input"
    )
    kernel = f"{attn}/proj"
    b.linear(kernel, kernel, after**2, features, features, codes_arrive=True, out_on_chip=True)
    b.plain(f"{attn}/residual", kernel, "elementwise", after**2 * features, 1, reads=stream, writes=stream)
    sam_vit.mlp(b, path, after**2, features, block.mlp_dim)
    return after


def _neck(b: Builder, c: Sam2Config) -> None:
    """Every level at the decoder's width; the third with the fourth added, the first two made narrower."""
    neck, out = "image_encoder/neck", c.out_chans
    for level in range(LEVELS):
        rows, path = (c.img_size // (PATCH_STRIDE << level)) ** 2, f"{neck}/convs_{level}"
        b.linear(path, path, rows, c.width(level), out)
        if level < 2:
            narrow = f"{neck}/high_res_{level}"
            b.linear(narrow, narrow, rows, out, out // (8 if level == 0 else 4))
    size = c.grid**2 * out
    b.plain(
        f"{neck}/sum", f"{neck}/sum", "elementwise", size, 2, parameters=out, reads=(size, size // 4), writes=(size,)
    )
