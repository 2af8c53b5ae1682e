"""Counts of MobileSAM and SAM 2 against XLA's view of our own forward."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import hwcost
from ahcptq_jax import W4A4
from ahcptq_jax.architectures import architecture_of
from ahcptq_jax.architectures.base import module_of, traced_sites
from ahcptq_jax.architectures.sites import intercept_sites
from ahcptq_jax.mixed.sensitivity import products
from hwcost.counts.builder import GELU_OPS
from sam_flax.encoders import attention
from sam_flax.encoders.hiera import SAM2_CONFIGS
from sam_flax.encoders.tiny_vit import MOBILE_SAM

PROMPTS = 2
CONFIGS = {"mobile_sam": MOBILE_SAM, **{f"sam2 {name}": config for name, config in SAM2_CONFIGS.items()}}


def xla_gelu_flops() -> float:
    """What XLA counts for one GELU, whose error function it writes out as a polynomial."""
    lowered = jax.jit(lambda x: jax.nn.gelu(x, approximate=False)).lower(jax.ShapeDtypeStruct((1000,), jnp.float32))
    return lowered.cost_analysis()["flops"] / 1000


def xla_flops(config: Any) -> float:
    """XLA's floating-point operations of one image with its prompts; nothing is compiled or run."""
    sam = module_of(config)
    params = jax.eval_shape(sam.init_params, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, config.img_size, config.img_size, 3), jnp.float32)

    def normalized(path: str, value: Any) -> Any:
        # As where the softmax is quantized: without a quantizer, values are weighted first and divided after.
        return jax.lax.optimization_barrier(value) if path.endswith("/softmax") else value

    def forward(params: Any, image: jax.Array, boxes: jax.Array) -> Any:
        with intercept_sites(normalized):
            return sam.apply({"params": params}, image, boxes=boxes)

    lowered = jax.jit(forward).lower(params, images, jax.ShapeDtypeStruct((PROMPTS, 4), jnp.float32))
    return lowered.cost_analysis()["flops"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "mobile_sam" else pytest.mark.slow) for name in CONFIGS]
)
def test_multiply_accumulates_are_those_of_our_own_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 1 %: XLA leaves out the zeros around a convolution, and counts maxima and selections that we do not."""
    for bound in ("CPU_WHOLE_BYTES", "MAX_ATTENTION_BYTES"):  # in parts XLA sees one iteration of a loop
        monkeypatch.setattr(attention, bound, 2**62)
    config = CONFIGS[name]
    counts = hwcost.count(config, prompts=PROMPTS)
    gelus = sum(n.ops.transcendentals for n in counts.layers if n.path.rsplit("/", 1)[-1].startswith("gelu"))
    single = counts.ops.elementwise + gelus * (xla_gelu_flops() - GELU_OPS)
    ratio = (2 * counts.ops.macs + single) / xla_flops(config)
    print(name, counts.ops.macs, ratio)
    assert ratio == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", ["mobile_sam", "sam2 tiny"])
def test_a_quantized_model_has_as_many_products_and_fewer_bytes(name: str) -> None:
    plain, quantized = (hwcost.count(CONFIGS[name], config) for config in (None, W4A4))
    assert quantized.ops.macs == plain.ops.macs and quantized.ops.int_macs > 0.8 * plain.ops.macs
    assert quantized.totals()["weight_bytes"] < 0.4 * plain.totals()["weight_bytes"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "mobile_sam" else pytest.mark.slow) for name in CONFIGS]
)
def test_a_budget_counts_the_same_multiply_accumulates(name: str) -> None:
    """Layer by layer, strided convolutions among them: what `bitops:` spends is what the cost model counts."""
    config = CONFIGS[name]
    sam = module_of(config)
    architecture = architecture_of(sam)
    params = jax.eval_shape(sam.init_params, jax.random.key(0))
    found = products(architecture, sam, params, PROMPTS, sorted(traced_sites(architecture, sam)))
    counted = {layer.path: layer.ops.macs for layer in hwcost.count(config, prompts=PROMPTS).layers}
    layers = {p.left.removesuffix("/input"): p.macs for p in found if p.right is None}
    assert any("merges" in path for path in layers) or name != "mobile_sam"
    assert {path: counted[path] for path in layers} == layers
