"""transformers' SAM 2 on random weights; writes tests/data/sam2_tiny_s0.npz.

    python -m tests.sam_flax.models.sam2_reference

Needs torch and transformers.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from sam_flax.encoders.hiera import Sam2Config
from tests.sam_flax.models.random_weights import random_image, random_prompts, random_state

DATA = Path(__file__).parents[2] / "data" / "sam2_tiny_s0.npz"
TINY = Sam2Config(
    img_size=128,
    patch_size=16,
    embed_dim=8,
    num_heads=1,
    depths=(1, 2, 2, 1),
    window_sizes=(8, 4, 6, 3),
    global_attn_indexes=(4,),
    background_size=3,
    out_chans=32,
    decoder_num_heads=2,
    decoder_mlp_dim=48,
    iou_head_hidden_dim=24,
)


def build(config: Sam2Config) -> Any:
    """A `Sam2Model` of our configuration."""
    import transformers

    grids = [config.img_size // stride for stride in (4, 8, 16)]
    widths = [config.width(stage) for stage in range(4)]
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=config.embed_dim,
        num_attention_heads=config.num_heads,
        image_size=[config.img_size] * 2,
        window_positional_embedding_background_size=[config.background_size] * 2,
        blocks_per_stage=list(config.depths),
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[config.num_heads << stage for stage in range(4)],
        window_size_per_stage=list(config.window_sizes),
        global_attention_blocks=list(config.global_attn_indexes),
    )
    vision = transformers.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=widths[::-1],
        backbone_feature_sizes=[[grid, grid] for grid in grids],
        fpn_hidden_size=config.out_chans,
    )
    prompts = transformers.Sam2PromptEncoderConfig(
        hidden_size=config.out_chans, image_size=config.img_size, mask_input_channels=config.mask_in_chans
    )
    decoder = transformers.Sam2MaskDecoderConfig(
        hidden_size=config.out_chans,
        mlp_dim=config.decoder_mlp_dim,
        num_attention_heads=config.decoder_num_heads,
        iou_head_hidden_dim=config.iou_head_hidden_dim,
    )
    whole = transformers.Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    return transformers.Sam2Model(whole).eval()


def with_random_weights(model: Any, seed: int) -> Any:
    """Fills a model with `random_state`, its two Fourier matrices alike."""
    import torch

    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state_of(shapes, seed).items()})
    return model


def state_of(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """`random_state` in which the Fourier matrix is the same in both of its places."""
    state = random_state(shapes, seed)
    state["shared_image_embedding.positional_embedding"] = state["prompt_encoder.shared_embedding.positional_embedding"]
    return state


def outputs(model: Any, image: np.ndarray, prompts: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The three features, and logits, predicted IoU and object score of every prompt."""
    import torch

    with torch.no_grad():
        features = model.get_image_embeddings(torch.from_numpy(image).permute(0, 3, 1, 2))
        names = ("quarter", "eighth", "embedding")
        result = {name: level.permute(0, 2, 3, 1).numpy() for name, level in zip(names, features, strict=True)}
        for name, prompt in prompts.items():
            given = {key: torch.from_numpy(value) for key, value in prompt.items()}
            count = len(next(iter(given.values())))
            for multimask in (True, False):
                parts: list[list[Any]] = [[], [], []]
                for i in range(count):  # one prompt at a time: its masks must be as many as its images
                    found = model(
                        image_embeddings=features,
                        input_points=given["coords"][None, i : i + 1] if "coords" in given else None,
                        input_labels=given["labels"][None, i : i + 1] if "labels" in given else None,
                        input_boxes=given["boxes"][None, i : i + 1] if "boxes" in given else None,
                        input_masks=given["masks"][i : i + 1].permute(0, 3, 1, 2) if "masks" in given else None,
                        multimask_output=multimask,
                    )
                    for part, value in zip(
                        parts, (found.pred_masks, found.iou_scores, found.object_score_logits), strict=True
                    ):
                        part.append(value[0].numpy())
                logits, iou, score = (np.concatenate(part) for part in parts)
                result |= {f"{name}/{multimask}/logits": logits, f"{name}/{multimask}/iou": iou}
                result[f"{name}/{multimask}/score"] = score
    return result


def prompts_of(config: Sam2Config, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """All kinds but masks alone, to which transformers adds an empty point that the official predictor does not."""
    prompts = random_prompts(config.img_size, config.mask_size, seed)
    return {name: prompt for name, prompt in prompts.items() if name != "masks"}


def main() -> None:
    """Writes the stored numbers."""
    model = with_random_weights(build(TINY), 0)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    found = outputs(model, random_image(TINY.img_size, 1), prompts_of(TINY, 2))
    stored = {name: value.astype(np.float16 if value.size > 5000 else np.float32) for name, value in found.items()}
    np.savez_compressed(DATA, shapes=json.dumps(shapes), **stored)
    print(DATA, DATA.stat().st_size, "bytes", {k: float(np.abs(v).max()) for k, v in found.items()})


if __name__ == "__main__":
    main()
