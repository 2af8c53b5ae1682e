"""The models that are trained here: MINI, and two as small with the image encoders of MobileSAM and SAM 2.

These two are there to measure on. They have the heads and the grid of mini-scenes, which they start from and whose
embeddings their encoders learn to make, as MobileSAM learned from SAM's (`--teacher`).
"""

from typing import Any

from sam_flax.config import MINI, MINI_SCENES
from sam_flax.encoders.hiera import Sam2Config
from sam_flax.encoders.tiny_vit import MobileSamConfig
from sam_flax.mobile_sam import MobileSam
from sam_flax.sam import Sam
from sam_flax.sam2 import Sam2
from sam_flax.segmenter import Segmenter

_HEADS: dict[str, Any] = {"out_chans": 128, "decoder_num_heads": 4, "decoder_mlp_dim": 256, "iou_head_hidden_dim": 128}

MINI_TINY_VIT = MobileSamConfig(
    img_size=160,
    patch_size=8,
    embed_dims=(48, 96, 160),
    depths=(1, 2, 3),
    num_heads=(3, 5),
    window_sizes=(5, 10),
    merge_strides=(2, 1),
    **_HEADS,
)
# A token of the embedding is 16 pixels wide in every SAM 2, so that a canvas twice as wide has the same grid.
MINI_HIERA = Sam2Config(
    img_size=320,
    patch_size=16,
    embed_dim=32,
    num_heads=1,
    depths=(1, 1, 4, 1),
    window_sizes=(8, 4, 10, 5),
    global_attn_indexes=(3, 5),
    background_size=5,
    **_HEADS,
)
MODELS: dict[str, Segmenter] = {
    "mini": Sam(MINI),
    "mini-scenes": Sam(MINI_SCENES),
    "mini-tiny-vit": MobileSam(MINI_TINY_VIT),
    "mini-hiera": Sam2(MINI_HIERA),
}
