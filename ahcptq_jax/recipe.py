"""Which tensor gets which quantizer (METHOD section 5), as data.

A rule maps a pattern over site paths to a kind. Everything that no rule names stays in floating point: patch
embedding, positions, norms, prompt encoder, output upscaling, IoU head and hypernetwork MLPs.
"""

import re
from typing import Literal

from ahcptq_jax.config import QuantConfig

Kind = Literal["uniform", "grouped", "hybrid", "log2"]

_ENCODER = r"image_encoder/blocks_\d+"
_DECODER = r"mask_decoder/transformer"
_DECODER_ATTENTION = _DECODER + r"/(layers_\d+/\w+_attn|layers_\d+/cross_attn_\w+|final_attn_token_to_image)"

RULES: tuple[tuple[str, Kind], ...] = (
    (_ENCODER + r"/attn/qkv/input", "grouped"),
    (_ENCODER + r"/attn/proj/input", "uniform"),
    (_ENCODER + r"/attn/[qkv]", "uniform"),
    (_ENCODER + r"/attn/softmax", "log2"),
    (_ENCODER + r"/mlp/lin1/input", "grouped"),
    (_ENCODER + r"/mlp/lin2/input", "hybrid"),
    (r"image_encoder/neck/conv[12]/input", "uniform"),
    (_DECODER_ATTENTION + r"/[qkv]_proj/input", "grouped"),
    (_DECODER_ATTENTION + r"/out_proj/input", "uniform"),
    (_DECODER_ATTENTION + r"/[qkv]", "uniform"),
    (_DECODER_ATTENTION + r"/softmax", "log2"),
    (_DECODER + r"/layers_\d+/mlp/lin1/input", "grouped"),
    (_DECODER + r"/layers_\d+/mlp/lin2/input", "hybrid"),
)
# Keys that BIG inspects: tokens attending to the image.
BIMODAL_ATTENTION = _DECODER + r"/(layers_\d+/cross_attn|final_attn)_token_to_image"


def site_kind(path: str, config: QuantConfig) -> Kind | None:
    """The quantizer of a site, after the method's switches; None for floating point."""
    for pattern, kind in RULES:
        if re.fullmatch(pattern, path):
            switched_off = {"hybrid": not config.hluq, "grouped": not config.cag, "log2": not config.agq}
            return "uniform" if switched_off.get(kind, False) else kind
    return None


def weight_path(site: str) -> str | None:
    """The linear or convolution whose input this site is, or None for the sites inside attention."""
    return site.removesuffix("/input") if site.endswith("/input") else None
