"""The public PyTorch image encoder (extra `parity`) for `experiments.benchmark`, as it is and rewritten to be fast."""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sam_flax.config import SamConfig


def public_module() -> Any:
    """`segment_anything.modeling.image_encoder`, without the rest of the package and its need of torchvision."""
    root = importlib.util.find_spec("segment_anything")
    assert root is not None and root.submodule_search_locations
    folder = Path(root.submodule_search_locations[0])
    for name, path in (("segment_anything", folder), ("segment_anything.modeling", folder / "modeling")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    return importlib.import_module("segment_anything.modeling.image_encoder")


def encoder(config: SamConfig, fused: bool) -> Callable[[], Any]:
    """A run of the public encoder with random weights on a random image.

    Args:
        config: of the encoder.
        fused: with `fused_attention` in place of its own.
    """
    import torch

    public = public_module()
    torch.manual_seed(0)
    model = public.ImageEncoderViT(
        img_size=config.img_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        out_chans=config.out_chans,
        qkv_bias=True,
        use_rel_pos=True,
        window_size=config.window_size,
        global_attn_indexes=config.global_attn_indexes,
    ).eval()
    if fused:
        for block in model.blocks:
            block.attn.forward = fused_attention(public, block.attn, in_turn=block.window_size == 0)
    images = torch.randn(1, 3, config.img_size, config.img_size)

    def run() -> Any:
        with torch.inference_mode():
            return model(images)

    return run


def fused_attention(public: Any, attention: Any, in_turn: bool) -> Callable[[Any], Any]:
    """The forward function of an `Attention` by `scaled_dot_product_attention` with an explicit bias.

    The fastest form for CPUs that we know of in PyTorch.

    Args:
        public: see `public_module`.
        attention: the module whose weights it takes.
        in_turn: one head after the other, whose bias alone exists then: for maps that are large.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    def bias(q: Any, height: int, width: int) -> Any:  # (G, H*W, C) -> (G, H*W, H*W)
        grid = q.reshape(len(q), height, width, -1)
        rows = torch.einsum("bhwc,hkc->bhwk", grid, public.get_rel_pos(height, height, attention.rel_pos_h))
        columns = torch.einsum("bhwc,wkc->bhwk", grid, public.get_rel_pos(width, width, attention.rel_pos_w))
        return (rows[..., :, None] + columns[..., None, :]).reshape(len(q), height * width, height * width)

    def forward(x: Any) -> Any:  # (B, H, W, D) -> (B, H, W, D)
        batch, height, width, dim = x.shape
        qkv = attention.qkv(x).reshape(batch, height * width, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, batch * attention.num_heads, height * width, -1).unbind(0)
        step = 1 if in_turn else len(q)
        parts = []
        for i in range(0, len(q), step):
            some = [a[i : i + step, None] for a in (q, k, v)]
            mask = bias(q[i : i + step], height, width)[:, None]
            parts.append(scaled_dot_product_attention(*some, attn_mask=mask)[:, 0])
        out = torch.cat(parts).reshape(batch, attention.num_heads, height, width, -1).permute(0, 2, 3, 1, 4)
        return attention.proj(out.reshape(batch, height, width, dim))

    return forward
