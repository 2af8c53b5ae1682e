"""Other people's image encoders for `experiments.benchmark`.

The public PyTorch one (extra `parity`) as it is, rewritten to be fast, and exported to ONNX for other runtimes (extra
`peers`), in floating point and quantized by ONNX Runtime's own tool.
"""

import importlib
import importlib.util
import os
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

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


def public_encoder(config: SamConfig) -> tuple[Any, Any]:
    """The module that `public_module` is, and the public encoder with random weights."""
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
    )
    return public, model.eval()


def encoder(config: SamConfig, fused: bool) -> Callable[[], Any]:
    """A run of the public encoder with random weights on a random image.

    Args:
        config: of the encoder.
        fused: with `fused_attention` in place of its own.
    """
    import torch

    public, model = public_encoder(config)
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


# ------------------------------------------------------------------------------------------------- other runtimes


def export_public(config: SamConfig, path: Path) -> None:
    """Writes the public encoder with random weights as ONNX, by PyTorch's own exporter."""
    import torch

    _, model = public_encoder(config)
    images = torch.randn(1, 3, config.img_size, config.img_size)
    with torch.inference_mode():
        torch.onnx.export(model, (images,), str(path), input_names=["images"], output_names=["image_embeddings"])


def onnxruntime_run(path: Path, size: int) -> Callable[[], Any]:
    """Runs of an encoder's ONNX file in ONNX Runtime on a random image of size x size pixels."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_processors()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    return lambda: session.run(None, {session.get_inputs()[0].name: images})


def available_processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _onnxruntime(config: SamConfig) -> Callable[[], Any]:
    with tempfile.TemporaryDirectory() as folder:
        export_public(config, Path(folder) / "public.onnx")
        return onnxruntime_run(Path(folder) / "public.onnx", config.img_size)


def _onnxruntime_dynamic(config: SamConfig) -> Callable[[], Any]:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        export_public(config, Path(folder) / "public.onnx")
        quantized = Path(folder) / "dynamic.onnx"
        # As segment_anything's own export script calls it.
        quantize_dynamic(Path(folder) / "public.onnx", quantized, weight_type=QuantType.QUInt8)
        return onnxruntime_run(quantized, config.img_size)


def _openvino(config: SamConfig) -> Callable[[], Any]:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        export_public(config, Path(folder) / "public.onnx")
        settings = {"INFERENCE_NUM_THREADS": str(available_processors()), "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(str(Path(folder) / "public.onnx"), "CPU", settings)
    images = np.random.default_rng(0).standard_normal((1, 3, config.img_size, config.img_size)).astype(np.float32)
    return lambda: compiled([images])


RUNTIMES: dict[str, Callable[[SamConfig], Callable[[], Any]]] = {
    "onnxruntime": _onnxruntime,
    "onnxruntime quantize_dynamic": _onnxruntime_dynamic,
    "openvino": _openvino,
}
