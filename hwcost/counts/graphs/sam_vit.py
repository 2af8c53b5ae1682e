"""The graph of a SAM with a ViT encoder as layers: the encoder once, the decoder for all prompts.

Attention windows are padded to whole ones; the projections before and after them see no padding. Rows of all prompts
share one product in the decoder, so that its weights are read once for all of them.
"""

from hwcost.counts.builder import GELU_OPS, Builder
from hwcost.counts.costs import Gemm, Tensor
from sam_flax.config import SamConfig, SegmenterConfig
from sam_flax.encoders.hiera import Sam2Config

# What the layers leave out, and why it may matter.
UNMODELLED: tuple[str, ...] = (
    "mask prompts: the counted prompts are boxes (mask_downscaling idle, its weights not loaded)",
    "window partition, head splitting and transposes: address generation, no arithmetic",
    "reading a window of the residual stream out of order: DRAM pages beyond the stated efficiency",
)


def add_layers(b: Builder, c: SamConfig, prompts: int) -> None:
    """Adds the encoder's layers, then the decoder's for `prompts` boxes."""
    encoder(b, c)
    decoder(b, c, prompts)


def encoder(b: Builder, c: SamConfig) -> None:
    """Adds patch embedding, blocks and neck."""
    b.part = "encoder"
    tokens, dim = c.grid**2, c.embed_dim
    path = "image_encoder/patch_embed/proj"
    patch = Gemm(tokens, 3 * c.patch_size**2, dim)
    b.product(path, path, "conv", patch, b.float, b.float, bias=dim, out_on_chip=True)
    size = tokens * dim
    b.plain("image_encoder/pos_embed", path, "elementwise", size, 1, parameters=size, writes=(size,))
    for index in range(c.depth):
        _encoder_block(b, c, index)
    neck(b, c.grid, c.embed_dim, c.out_chans)


def _encoder_block(b: Builder, c: SamConfig, index: int) -> None:
    block, window = f"image_encoder/blocks_{index}", c.block_window(index)
    side = window or c.grid
    windows = (-(-c.grid // window)) ** 2 if window else 1
    tokens, dim = c.grid**2, c.embed_dim
    stream = (tokens * dim,)  # the residual stream, in floating point

    attn = f"{block}/attn"
    kernel = f"{attn}/qkv"
    b.norm(f"{block}/norm1", kernel, tokens, dim, reads=stream)
    # q, k and v are three uniform sites of one format.
    b.linear(kernel, kernel, tokens, dim, 3 * dim, a_on_chip=True, out_site=f"{attn}/q")
    b.attention(
        attn, heads=c.num_heads * windows, queries=side**2, keys=side**2, dim=c.head_dim, positions=side,
        out_site=f"{attn}/proj/input",
    )  # fmt: skip
    kernel = f"{attn}/proj"
    b.linear(kernel, kernel, tokens, dim, dim, codes_arrive=True, out_on_chip=True)
    b.plain(f"{attn}/residual", kernel, "elementwise", tokens * dim, 1, reads=stream, writes=stream)

    mlp(b, block, tokens, dim, int(dim * c.mlp_ratio))


def mlp(b: Builder, block: str, tokens: int, dim: int, hidden: int) -> None:
    """Adds the norm, the MLP with GELU and the residual of an encoder's block."""
    path, stream = f"{block}/mlp", (tokens * dim,)
    kernel = f"{path}/lin1"
    b.norm(f"{block}/norm2", kernel, tokens, dim, reads=stream)
    b.linear(kernel, kernel, tokens, dim, hidden, a_on_chip=True, out_on_chip=True)
    b.activation(path, kernel, tokens * hidden, "gelu")
    kernel = f"{path}/lin2"
    b.linear(kernel, kernel, tokens, hidden, dim, codes_arrive=True, out_on_chip=True)
    b.plain(f"{path}/residual", kernel, "elementwise", tokens * dim, 1, reads=stream, writes=stream)


def neck(b: Builder, grid: int, dim: int, out: int) -> None:
    """Adds the two convolutions and norms that end an encoder."""
    tokens, path = grid**2, "image_encoder/neck"
    conv1, conv2 = f"{path}/conv1", f"{path}/conv2"
    b.linear(conv1, conv1, tokens, dim, out, out_on_chip=True, bias=False, kind="conv")
    a = b.site(f"{conv2}/input")
    b.norm(f"{path}/norm1", conv1, tokens, out, writes=(tokens * out,), written=a)
    b.product(
        conv2,
        conv2,
        "conv",
        Gemm(tokens, 9 * out, out),
        a,
        b.weight(f"{conv2}/input"),
        a_site=f"{conv2}/input",
        # The 3x3 convolution reads each input nine times from the buffer but once from DRAM.
        source=Tensor(tokens * out, a.bits),
        out_on_chip=True,
        encodes=0 if a.is_float else tokens * out,
    )
    b.norm(f"{path}/norm2", conv2, tokens, out, writes=(tokens * out,))


def decoder(b: Builder, c: SegmenterConfig, prompts: int) -> None:
    """Adds prompt encoder and mask decoder for `prompts` boxes."""
    b.part = "decoder"
    image, dim = c.grid**2, c.out_chans
    masks = c.num_multimask_outputs + 1
    scored = isinstance(c, Sam2Config)
    outputs = 1 + masks + scored  # IoU token, mask tokens, and that of the object score
    tokens = outputs + 2 + scored  # two corners of a box, and a padding point
    _prompts(b, c, prompts)
    path = "mask_decoder/embed"
    size = prompts * image * dim
    b.plain(path, path, "elementwise", size, 1, parameters=outputs * dim, reads=(image * dim,), writes=(size,))
    for index in range(c.decoder_depth):
        _two_way_block(b, c, f"mask_decoder/transformer/layers_{index}", index, prompts, tokens)
    final = "mask_decoder/transformer/final_attn_token_to_image"
    _cross_attention(b, c, final, prompts, tokens, image)
    b.norm("mask_decoder/transformer/norm_final_attn", f"{final}/out_proj", prompts * tokens, dim)
    _upscaling(b, c, prompts)
    for index in range(masks):
        _mlp(b, f"mask_decoder/output_hypernetworks_mlps_{index}", prompts, (dim, dim, dim, dim // 8))
    hidden = c.iou_head_hidden_dim
    _mlp(b, "mask_decoder/iou_prediction_head", prompts, (dim, *[hidden] * (c.iou_head_depth - 1), masks))
    if scored:
        path = "mask_decoder/iou_sigmoid"
        b.plain(path, path, "activation", prompts * masks, 1, transcendentals=prompts * masks)
        _mlp(b, "mask_decoder/pred_obj_score_head", prompts, (dim, dim, dim, 1))
    path = "mask_decoder/masks"
    product = Gemm(masks, dim // 8, 16 * image, repeat=prompts)
    b.product(path, path, "attention", product, b.float, b.float, dynamic_b=True)


def _prompts(b: Builder, c: SegmenterConfig, prompts: int) -> None:
    """Positional encoding of the two corners of each box and, once per call, of every image token."""
    image, dim = c.grid**2, c.out_chans
    path = "prompt_encoder/pe_layer"
    for name, rows in (("boxes", 2 * prompts), ("dense", image)):
        b.product(
            f"{path}/{name}", path, "linear", Gemm(rows, 2, dim // 2), b.float, b.float,
            parameters=dim if name == "boxes" else 0, out_on_chip=True, elementwise=4 * rows,
        )  # fmt: skip
    rows = 2 * prompts + image
    b.plain(
        f"{path}/sincos", path, "elementwise", rows * (dim // 2), 1,
        transcendentals=rows * dim,
        parameters=4 * dim + 2 * dim,  # point and box embeddings, not_a_point_embed, no_mask_embed
        writes=(rows * dim,),
    )  # fmt: skip


def _two_way_block(b: Builder, c: SegmenterConfig, block: str, index: int, prompts: int, tokens: int) -> None:
    image, dim, heads, hidden = c.grid**2, c.out_chans, c.decoder_num_heads, c.decoder_mlp_dim
    rows = prompts * tokens
    queries = (rows * dim,)

    attn = f"{block}/self_attn"
    if index:
        b.plain(f"{attn}/query_pe", f"{attn}/q_proj", "elementwise", rows * dim, 1, reads=2 * queries)
    for name in "qkv":
        path = f"{attn}/{name}_proj"
        b.linear(path, path, rows, dim, dim, a_on_chip=bool(index) and name != "v", out_site=f"{attn}/{name}")
    out_proj = f"{attn}/out_proj"
    b.attention(
        attn, heads=prompts * heads, queries=tokens, keys=tokens, dim=dim // heads, out_site=f"{out_proj}/input"
    )
    b.linear(out_proj, out_proj, rows, dim, dim, codes_arrive=True, out_on_chip=True)
    if index:
        b.plain(f"{attn}/residual", out_proj, "elementwise", rows * dim, 1, reads=queries)
    b.norm(f"{block}/norm1", out_proj, rows, dim, writes=queries)

    attn = f"{block}/cross_attn_token_to_image"
    _cross_attention(b, c, attn, prompts, tokens, image)
    b.norm(f"{block}/norm2", f"{attn}/out_proj", rows, dim, writes=queries)

    lin1, lin2 = f"{block}/mlp/lin1", f"{block}/mlp/lin2"
    b.linear(lin1, lin1, rows, dim, hidden, out_on_chip=True)
    b.activation(f"{block}/mlp", lin1, rows * hidden, "relu")
    b.linear(lin2, lin2, rows, hidden, dim, codes_arrive=True, out_on_chip=True)
    b.plain(f"{block}/mlp/residual", lin2, "elementwise", rows * dim, 1, reads=queries)
    b.norm(f"{block}/norm3", lin2, rows, dim, writes=queries)

    attn = f"{block}/cross_attn_image_to_token"
    _cross_attention(b, c, attn, prompts, image, tokens, keys_reused=True)
    b.norm(f"{block}/norm4", f"{attn}/out_proj", prompts * image, dim, writes=(prompts * image * dim,))


def _cross_attention(
    b: Builder, c: SegmenterConfig, attn: str, prompts: int, queries: int, keys: int, *, keys_reused: bool = False
) -> None:
    """Half-width attention between tokens and image; positional encodings are added to queries and keys.

    `keys_reused`: the queries are the sum that token-to-image made for its keys, so that nothing is added to them.
    """
    dim, heads = c.out_chans, c.decoder_num_heads
    inner = dim // 2
    sides = (("k", keys),) if keys_reused else (("q", queries), ("k", keys))
    for name, count in sides:
        size = prompts * count * dim
        b.plain(f"{attn}/{name}_pe", f"{attn}/{name}_proj", "elementwise", size, 1, reads=(size, count * dim))
    summed = {name for name, _ in sides}
    for name, count in (("q", queries), ("k", keys), ("v", keys)):
        path = f"{attn}/{name}_proj"
        b.linear(path, path, prompts * count, dim, inner, a_on_chip=name in summed, out_site=f"{attn}/{name}")
    out_proj = f"{attn}/out_proj"
    b.attention(
        attn, heads=prompts * heads, queries=queries, keys=keys, dim=inner // heads, out_site=f"{out_proj}/input"
    )
    b.linear(out_proj, out_proj, prompts * queries, inner, dim, codes_arrive=True, out_on_chip=True)
    size = prompts * queries * dim
    b.plain(f"{attn}/residual", out_proj, "elementwise", size, 1, reads=(size,))


def _upscaling(b: Builder, c: SegmenterConfig, prompts: int) -> None:
    image, dim = prompts * c.grid**2, c.out_chans
    path = "mask_decoder/output_upscaling"
    for name, rows, channels, features, norm in (
        ("1", image, dim, dim // 4, True),
        ("2", 4 * image, dim // 4, dim // 8, False),
    ):
        kernel = f"{path}/conv{name}"
        # Kernel 2, stride 2: every pixel becomes four.
        up = Gemm(rows, channels, 4 * features)
        b.product(kernel, kernel, "conv", up, b.float, b.float, bias=features, out_on_chip=True)
        if isinstance(c, Sam2Config):  # the encoder's features, at this resolution
            size, own = 4 * rows * features, 4 * rows * features // prompts
            b.plain(f"{path}/features{name}", kernel, "elementwise", size, 1, reads=(own,))
        if norm:
            b.norm(f"{path}/norm{name}", kernel, 4 * rows, features)
        size = 4 * rows * features
        b.plain(f"{path}/gelu{name}", kernel, "activation", size, GELU_OPS, transcendentals=size, writes=(size,))


def _mlp(b: Builder, path: str, rows: int, sizes: tuple[int, ...]) -> None:
    """A small MLP with ReLU on one token of each prompt."""
    for j, (channels, features) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        last = j == len(sizes) - 2
        b.linear(f"{path}/layers_{j}", path, rows, channels, features, a_on_chip=j > 0, out_on_chip=not last)
        if not last:
            b.plain(f"{path}/relu_{j}", path, "activation", rows * features, 1)
