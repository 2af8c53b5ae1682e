"""The public MobileSAM (mobilesam-mirror on PyPI) on random weights; writes tests/data/mobile_sam_tiny_s0.npz.

    python -m tests.sam_flax.models.mobile_sam_reference

Needs torch and mobilesam-mirror, and neither timm nor torchvision: of those the modules that matter use three small
things, for which stand-ins are put in their place while mobile_sam is imported.
"""

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

from tests.sam_flax.models.random_weights import random_image, random_prompts, random_state

DATA = Path(__file__).parents[2] / "data" / "mobile_sam_tiny_s0.npz"
# The last merge keeps the grid at a few widths only, 320 among them; the other layers are as narrow as may be.
TINY = dict(embed_dims=[8, 16, 24, 320], depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 5], window_sizes=[7, 3, 4, 3])
TINY_SIZE, TINY_CHANS = 128, 32


def modules() -> Any:
    """`mobile_sam.modeling`."""
    import torch

    class DropPath(torch.nn.Identity):
        def __init__(self, drop_prob: float = 0.0) -> None:
            super().__init__()

    stubs = {
        "timm": {},
        "timm.models": {},
        "timm.models.layers": dict(
            DropPath=DropPath, to_2tuple=lambda x: (x, x), trunc_normal_=torch.nn.init.trunc_normal_
        ),
        "timm.models.registry": dict(register_model=lambda f: f),
        "torchvision": {},
        "torchvision.transforms": {},
        "torchvision.transforms.functional": dict(resize=None, to_pil_image=None),
        "torchvision.ops": {},
        "torchvision.ops.boxes": dict(batched_nms=None, box_area=None),
    }
    kept = {name: sys.modules.get(name) for name in stubs}
    for name, members in stubs.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(members)
    try:
        import mobile_sam.modeling
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return mobile_sam.modeling


def build(size: int, chans: int, mlp_dim: int, heads: int, hidden: int, **encoder: Any) -> Any:
    """A MobileSAM of any size: the official encoder takes 1024 pixels alone, by one line that is bypassed here."""
    import torch

    m = modules()
    vit = m.TinyViT(img_size=size, num_classes=10, drop_path_rate=0.0, **encoder)
    grid = size // 16
    if chans != 256:
        norm = type(vit.neck[1])
        vit.neck = torch.nn.Sequential(
            torch.nn.Conv2d(encoder["embed_dims"][-1], chans, 1, bias=False),
            norm(chans),
            torch.nn.Conv2d(chans, chans, 3, padding=1, bias=False),
            norm(chans),
        )

    def encode(x: Any) -> Any:
        x = vit.patch_embed(x)
        for layer in vit.layers:
            x = layer(x)
        return vit.neck(x.reshape(len(x), grid, grid, -1).permute(0, 3, 1, 2))

    vit.forward = encode
    sides = (grid, grid)
    prompts = m.PromptEncoder(
        embed_dim=chans, image_embedding_size=sides, input_image_size=(size, size), mask_in_chans=16
    )
    transformer = m.TwoWayTransformer(depth=2, embedding_dim=chans, mlp_dim=mlp_dim, num_heads=heads)
    decoder = m.MaskDecoder(
        transformer_dim=chans,
        transformer=transformer,
        num_multimask_outputs=3,
        iou_head_depth=3,
        iou_head_hidden_dim=hidden,
    )
    return m.Sam(image_encoder=vit, prompt_encoder=prompts, mask_decoder=decoder)


def with_random_weights(model: Any, seed: int) -> Any:
    """Fills a model with `random_state`."""
    import torch

    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    state = {name: torch.from_numpy(np.array(value)) for name, value in random_state(shapes, seed).items()}
    model.load_state_dict(state)
    model.train(True)
    return model.train(False)  # gathers the biases of each pair of tokens anew


def outputs(model: Any, image: np.ndarray, prompts: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The embedding, and logits and predicted IoU of every prompt, with several masks and with one."""
    import torch

    with torch.no_grad():
        embedding = model.image_encoder(torch.from_numpy(image).permute(0, 3, 1, 2))
        result = {"embedding": embedding.permute(0, 2, 3, 1).numpy()}
        for name, prompt in prompts.items():
            given = {key: torch.from_numpy(value) for key, value in prompt.items()}
            sparse, dense = model.prompt_encoder(
                points=(given["coords"], given["labels"]) if "coords" in given else None,
                boxes=given.get("boxes"),
                masks=given["masks"].permute(0, 3, 1, 2) if "masks" in given else None,
            )
            for multimask in (True, False):
                logits, iou = model.mask_decoder(
                    image_embeddings=embedding,
                    image_pe=model.prompt_encoder.get_dense_pe(),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    multimask_output=multimask,
                )
                result[f"{name}/{multimask}/logits"], result[f"{name}/{multimask}/iou"] = logits.numpy(), iou.numpy()
    return result


def main() -> None:
    """Writes the stored numbers."""
    model = with_random_weights(build(TINY_SIZE, TINY_CHANS, 48, 2, 24, **TINY), 0)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    found = outputs(model, random_image(TINY_SIZE, 1), random_prompts(TINY_SIZE, TINY_SIZE // 4, 2))
    # Half precision is a thousandth finer than what is promised, relative to the largest value.
    stored = {name: value.astype(np.float16 if value.size > 5000 else np.float32) for name, value in found.items()}
    np.savez_compressed(DATA, shapes=json.dumps(shapes), **stored)
    print(DATA, DATA.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
