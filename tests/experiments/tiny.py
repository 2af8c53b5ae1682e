"""A SAM of one block on a canvas of 64 pixels, for tests that need some model."""

from sam_flax import SamConfig

TINY = SamConfig(
    img_size=64,
    patch_size=16,
    embed_dim=16,
    depth=1,
    num_heads=1,
    window_size=2,
    global_attn_indexes=(0,),
    out_chans=16,
    decoder_depth=1,
    decoder_num_heads=2,
    decoder_mlp_dim=16,
    iou_head_hidden_dim=16,
)
