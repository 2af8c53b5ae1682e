"""Counts against XLA's view of our own forward, and against what the arithmetic must add up to."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import hwcost
from ahcptq_jax import W4A4, QuantConfig
from ahcptq_jax.architectures.sites import intercept_sites
from ahcptq_jax.quantizers.packing import packed_size
from ahcptq_jax.recipe import site_kind
from ahcptq_jax.rules import Rule
from hwcost.counts.builder import GELU_OPS
from hwcost.counts.codes import Histogram
from hwcost.counts.counts import Counts
from hwcost.counts.graphs import graph_named
from hwcost.study.variants import METHOD, variants
from sam_flax.config import CONFIGS, VIT_B, SamConfig
from sam_flax.config import MINI_SCENES as MINI
from sam_flax.encoders import vit
from sam_flax.errors import InputError
from sam_flax.sam import Sam

# The paper's form of W4A4, without the grid that is the default.
PAPER = dataclasses.replace(W4A4, grid_bits=0)
# Two kinds of block and the padding of windows that do not divide the grid, in a graph that traces in seconds.
SMALL = dataclasses.replace(VIT_B, img_size=320, depth=2, global_attn_indexes=(1,))
PROMPTS = 2


def _products(jaxpr: Any) -> Iterator[tuple[Any, int]]:
    """Every dot_general of a jaxpr, nested ones included, with its multiply-accumulates."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            macs = equation.outvars[0].aval.size
            for axis in contracted:
                macs *= equation.invars[0].aval.shape[axis]
            yield equation, macs
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _products(inner)


def _forward(config: SamConfig) -> tuple[Any, tuple[Any, ...]]:
    sam = Sam(config)
    params = jax.eval_shape(sam.init_params, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, config.img_size, config.img_size, 3), jnp.float32)
    boxes = jax.ShapeDtypeStruct((PROMPTS, 4), jnp.float32)

    def normalized(path: str, value: Any) -> Any:
        # As where the softmax is quantized: without a quantizer, values are weighted first and divided after.
        return jax.lax.optimization_barrier(value) if path.endswith("/softmax") else value

    def forward(params: Any, image: jax.Array, boxes: jax.Array) -> Any:
        with intercept_sites(normalized):
            return sam.apply({"params": params}, image, boxes=boxes)

    return forward, (params, images, boxes)


def _xla_gelu_flops() -> float:
    """What XLA counts for one GELU, whose error function it writes out as a polynomial."""
    n = 1000
    lowered = jax.jit(lambda x: jax.nn.gelu(x, approximate=False)).lower(jax.ShapeDtypeStruct((n,), jnp.float32))
    return lowered.cost_analysis()["flops"] / n


def compare_with_xla(config: SamConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Ratios ours / XLA: exact products, multiply-accumulates alone, and with single-number operations."""
    # In chunks XLA sees one iteration of a loop; nothing is run, so the whole map costs no memory.
    monkeypatch.setattr(vit, "_attention_bytes", lambda: (2**62, 2**62))
    forward, args = _forward(config)
    cost = jax.jit(forward).lower(*args).cost_analysis()
    counts = hwcost.count(config, prompts=PROMPTS)
    ops = counts.ops
    gelus = sum(
        layer.ops.transcendentals for layer in counts.layers if layer.path.rsplit("/", 1)[-1].startswith("gelu")
    )
    single = ops.elementwise + gelus * (_xla_gelu_flops() - GELU_OPS)
    return {
        "products": ops.macs / sum(macs for _, macs in _products(jax.make_jaxpr(forward)(*args).jaxpr)),
        "macs": 2 * ops.macs / cost["flops"],
        "all": (2 * ops.macs + single) / cost["flops"],
        "transcendentals": ops.transcendentals / cost["transcendentals"],
    }


@pytest.mark.usefixtures("positions_by_definition")
@pytest.mark.parametrize("config", [SMALL, MINI], ids=["vit_b of depth 2", "mini"])
def test_macs_are_those_of_our_own_forward(config: SamConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = compare_with_xla(config, monkeypatch)
    print(ratios)
    assert ratios["products"] == 1.0
    assert ratios["all"] == pytest.approx(1, abs=1e-4)
    assert ratios["transcendentals"] == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("positions_by_definition")
@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_macs_of_the_official_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = compare_with_xla(CONFIGS[name], monkeypatch)
    print(name, ratios)
    assert ratios["products"] == 1.0
    assert ratios["all"] == pytest.approx(1, abs=2e-5)


@pytest.fixture(scope="module")
def quantized() -> Counts:
    return hwcost.count(VIT_B, PAPER)


def test_every_product_is_done_in_exactly_one_way(quantized: Counts) -> None:
    for layer in quantized.layers:
        ops = layer.ops
        assert ops.macs == ops.int_macs + ops.float_macs + ops.shifts + ops.skipped, layer.path
        assert ops.macs == (layer.gemm.macs if layer.gemm else 0)
    assert quantized.ops.macs == hwcost.count(VIT_B).ops.macs, "quantization changes how, not how many"
    assert sum(quantized.totals()["macs_by_width"].values()) == quantized.ops.macs


def test_what_the_recipe_leaves_in_floating_point_stays_there(quantized: Counts) -> None:
    floating = {layer.path for layer in quantized.layers if layer.gemm and layer.is_float}
    for layer in quantized.layers:
        if layer.gemm and layer.kind in ("linear", "conv"):
            assert (layer.path in floating) == (site_kind(f"{layer.path}/input", PAPER, "sam_vit") is None), layer.path
    share = quantized.ops.float_macs / quantized.ops.macs
    assert 0 < share < 0.05


def test_bytes_are_exact_below_a_byte() -> None:
    odd = QuantConfig(w_bits=3, a_bits=5)
    counts = hwcost.count(MINI, odd)
    layer = next(x for x in counts.layers if x.path == "image_encoder/blocks_0/attn/qkv")
    kernel = MINI.embed_dim * 3 * MINI.embed_dim
    bias = 3 * MINI.embed_dim * 4
    assert layer.weight_bytes == packed_size(kernel, 3) + bias
    assert layer.outputs[0].bytes == packed_size(layer.gemm.m * layer.gemm.n, 5)
    whole = hwcost.count(MINI, QuantConfig(w_bits=8, a_bits=8)).totals()["weight_bytes"]
    assert counts.totals()["weight_bytes"] < whole < hwcost.count(MINI).totals()["weight_bytes"]


def test_parameters_are_those_that_a_box_prompt_reads() -> None:
    params = jax.eval_shape(Sam(MINI).init_params, jax.random.key(0))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    idle = sum(leaf.size for leaf in jax.tree.leaves(params["prompt_encoder"]["mask_downscaling"]))
    assert hwcost.count(MINI).totals()["parameters"] == total - idle


def test_groups_cost_rescales_and_qparams_and_nothing_else() -> None:
    one, four = (hwcost.count(MINI, dataclasses.replace(PAPER, groups=g)).totals() for g in (1, 4))
    assert four["rescales"] > one["rescales"] and four["qparam_bytes"] > one["qparam_bytes"]
    for name in ("macs", "shifts", "weight_bytes", "activation_bytes"):
        assert four[name] == one[name]
    without = hwcost.count(MINI, dataclasses.replace(PAPER, cag=False)).totals()
    assert without["rescales"] == one["rescales"]


def test_a_measured_histogram_decides_between_shift_multiply_and_skip() -> None:
    site = "image_encoder/blocks_0/mlp/lin2/input"
    counts = (10, 20, 30, 0, 15) + (5,) * 5 + (0,) * 6  # four log codes: 60 shift, 15 zero, 25 multiply
    measured = hwcost.count(MINI, PAPER, {site: Histogram(counts=counts, log_levels=4)})
    layer = next(x for x in measured.layers if x.path == "image_encoder/blocks_0/mlp/lin2")
    macs = layer.ops.macs
    assert (layer.ops.shifts, layer.ops.skipped, layer.ops.int_macs) == (60 * macs // 100, 15 * macs // 100, macs // 4)
    assert layer.ops.dual_adds == layer.ops.int_macs
    assert measured.measured_sites == 1
    assumed = hwcost.count(MINI, PAPER)
    assert measured.assumed_sites == assumed.assumed_sites - 1
    softmax = "image_encoder/blocks_0/attn/softmax"
    av = next(
        x
        for x in hwcost.count(MINI, PAPER, {softmax: {"counts": [1] * 16, "tau": 4}}).layers
        if x.path == "image_encoder/blocks_0/attn/av"
    )
    assert av.accumulators == 4 and av.ops.skipped == av.ops.macs // 16 and av.ops.int_macs == 0


def test_without_hluq_and_agq_nothing_shifts() -> None:
    plain = hwcost.count(MINI, dataclasses.replace(PAPER, hluq=False, agq=False)).ops
    assert plain.shifts == plain.skipped == plain.dual_adds == 0 < plain.int_macs


@pytest.mark.parametrize("grid_bits", [5, 6, 7, 8])
def test_on_the_grid_every_product_has_one_sum(grid_bits: int, quantized: Counts) -> None:
    grid = hwcost.count(VIT_B, PAPER, grid_bits=grid_bits)
    for layer, paper in zip(grid.layers, quantized.layers, strict=True):
        assert layer.accumulators == 1 and layer.log_levels == 0, layer.path
        ops = layer.ops
        assert ops.shifts == ops.skipped == ops.dual_adds == 0 and ops.macs == ops.int_macs + ops.float_macs
        if layer.gemm and not layer.is_float:
            assert ops.rescales == layer.gemm.m * layer.gemm.n * layer.gemm.repeat, "one for each output"
        # Codes stay codes in memory and on the bus.
        assert (layer.inputs, layer.outputs, layer.weights) == (paper.inputs, paper.outputs, paper.weights)
        assert ops.float_macs == paper.ops.float_macs and ops.elementwise == paper.ops.elementwise
    by_path = {layer.path: layer for layer in grid.layers}
    block = "image_encoder/blocks_0"
    widths = {"mlp/lin2": grid_bits, "attn/qkv": grid_bits, "attn/av": grid_bits, "attn/qk": 4, "attn/proj": 4}
    for name, width in widths.items():
        layer = by_path[f"{block}/{name}"]
        assert layer.a.product_bits == width and layer.b.product_bits == 4, name
    assert grid.grid_bits == grid_bits and quantized.grid_bits == 0
    assert grid.layers == hwcost.count(VIT_B, dataclasses.replace(PAPER, grid_bits=grid_bits)).layers
    assert hwcost.count(VIT_B, W4A4).grid_bits == W4A4.grid_bits, "by default as it is quantized"


def test_on_the_grid_a_site_stores_its_table() -> None:
    def qparams(path: str, **switches: Any) -> int:
        counts = hwcost.count(MINI, dataclasses.replace(PAPER, **switches), grid_bits=8)
        return next(layer.qparam_bits for layer in counts.layers if layer.path == path)

    block, dim = "image_encoder/blocks_0", MINI.embed_dim
    weights = dim * (32 + 4)  # a scale and a zero point for each of lin2's outputs
    assert qparams(f"{block}/mlp/lin2") == weights + 2 * 32 + 16 * 8, "step, offset and 16 levels"
    # Four multiples of the step, one for each group, of which every channel names one; never more than eight.
    assert qparams(f"{block}/attn/qkv") == 3 * weights + 2 * 32 + 4 * 16 * 8 + dim * 2
    for groups in (8, 16, 0):
        assert qparams(f"{block}/attn/qkv", groups=groups) == 3 * weights + 2 * 32 + 8 * 16 * 8 + dim * 3


def test_widths_are_those_of_the_recipe_site_by_site() -> None:
    block = "image_encoder/blocks_0"
    rules = (
        Rule(r"image_encoder/.*/attn/qkv/input", a_bits=6, w_bits=3),
        Rule(r"image_encoder/.*/mlp/lin2/input", kind="uniform", a_bits=8),
        Rule(r"image_encoder/neck/conv1/input", kind="float"),
    )
    mixed = dataclasses.replace(PAPER, rules=rules)
    layers = {layer.path: layer for layer in hwcost.count(MINI, mixed).layers}
    widths = {name: layers[path].width for name, path in (
        ("qkv", f"{block}/attn/qkv"), ("lin1", f"{block}/mlp/lin1"), ("lin2", f"{block}/mlp/lin2"),
        ("neck", "image_encoder/neck/conv1"),
    )}  # fmt: skip
    assert widths == {"qkv": "6x3", "lin1": "4x4", "lin2": "8x4", "neck": "fp32xfp32"}
    lin2 = layers[f"{block}/mlp/lin2"].ops
    assert lin2.shifts == lin2.dual_adds == 0 < lin2.int_macs, "the rule's kind, not the architecture's"
    # One array serves all layers: its element is as wide as the widest codes.
    assert variants(MINI, mixed, grid_bits=8)[METHOD].design.bits == 8
    with pytest.raises(InputError, match="grid_bits=7 has no room for the 8-bit codes of image_encoder/blocks_0/mlp"):
        hwcost.count(MINI, mixed, grid_bits=7)


def test_prompts_scale_the_decoder_alone() -> None:
    one, eight = (hwcost.count(MINI, PAPER, prompts=p) for p in (1, 8))
    assert one.totals("encoder") == eight.totals("encoder")
    assert eight.totals("decoder")["macs"] > 7 * one.totals("decoder")["macs"]
    assert eight.totals("decoder")["weight_bytes"] == one.totals("decoder")["weight_bytes"]


def test_bad_arguments_get_one_sentence() -> None:
    with pytest.raises(ValueError, match="prompts=0"):
        hwcost.count(MINI, prompts=0)
    with pytest.raises(ValueError, match="float_bits=8"):
        hwcost.count(MINI, float_bits=8)
    for grid_bits in (1, 4, 9, -8):
        with pytest.raises(InputError, match=f"grid_bits={grid_bits} must be 5, 6, 7, 8, or 0"):
            hwcost.count(MINI, PAPER, grid_bits=grid_bits)
    with pytest.raises(InputError, match="grid_bits=5 has no room for the 6-bit codes of "):
        hwcost.count(MINI, QuantConfig(w_bits=4, a_bits=6), grid_bits=5)
    with pytest.raises(ValueError, match="no graph of the architecture 'hiera'; write hwcost/counts/graphs/hiera.py"):
        graph_named("hiera")
    with pytest.raises(ValueError, match="belongs to no"):
        hwcost.count(MINI, PAPER, {"image_encoder/blocks_9/attn/softmax": [1] * 16})
    with pytest.raises(ValueError, match="16 codes, not 2\\^5"):
        hwcost.count(MINI, dataclasses.replace(PAPER, a_bits=5), {"image_encoder/blocks_0/attn/softmax": [1] * 16})


@pytest.mark.parametrize("grid_bits", [0, 8])
def test_log_nonlinear_codes_multiply_by_way_of_a_table(grid_bits: int) -> None:
    """LNQ's codes have no arithmetic of their own: a table makes 8-bit numbers of them, with or without a grid."""
    config = dataclasses.replace(W4A4, grid_bits=grid_bits)
    found, plain = (
        {layer.path: layer for layer in hwcost.count(VIT_B, c).layers if layer.path.endswith("/av")}
        for c in (dataclasses.replace(config, lnq=True), config)
    )
    assert len(found) == VIT_B.depth + 3 * VIT_B.decoder_depth + 1
    for path, layer in found.items():
        assert layer.a is not None and layer.a.product_bits == 8 and layer.a.table_address == 4
        assert layer.ops.shifts == layer.ops.skipped == 0 and layer.ops.int_macs == layer.ops.macs
        assert (plain[path].ops.shifts > 0) == (grid_bits == 0)
