"""Reconstruction steps for `experiments.benchmark`: what is learned there, on random numbers of real shapes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ahcptq_jax.architectures import architecture_named
from ahcptq_jax.calibration import passes
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import Grouped, Hybrid, Log2, Quantizer, Uniform
from ahcptq_jax.recipe import recipe_of, weight_path
from ahcptq_jax.reconstruction import learning
from ahcptq_jax.reconstruction.config import ReconstructionConfig
from ahcptq_jax.reconstruction.objectives import LocalError
from ahcptq_jax.reconstruction.units import Operation, encoder_units
from ahcptq_jax.runtime.quantized import QuantizedWeight
from sam_flax import Sam
from sam_flax.config import SamConfig
from sam_flax.layers import MLPBlock

# Every channel on its own: the widest grouping, at which a reconstruction starts.
CONFIG = QuantConfig(groups=0)
# Past the warm-up, so that the regularizer takes part.
LEARNING = ReconstructionConfig(iterations=1000, warmup=0.0)


def _quantizer(kind: str, channels: int) -> Quantizer:
    bits = CONFIG.a_bits
    if kind == "grouped":
        ends = jnp.linspace(2.0, 4.0, channels)
        uniform = Uniform.from_range(-ends, ends, bits)
        return Grouped(uniform.scale, uniform.zero_point, jnp.arange(channels), bits)
    if kind == "hybrid":
        return Hybrid.from_range(-0.17, 5.0, 0.3, 0.25, bits)
    if kind == "log2":
        return Log2(jnp.float32(1.0), jnp.int32(2), bits)
    return Uniform.from_range(-4.0, 4.0, bits)


Store = tuple[tuple[jax.Array], tuple[jax.Array], jax.Array, tuple[jax.Array, ...]]


def _store(*shape: int) -> Store:
    """Quantized and original inputs and targets, each (images, 1, ...)."""
    quantized, original, target = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3))
    return (quantized,), (original,), target, ()


def _step(operation: Operation, prefix: str, store: Store, loss_axis: int) -> Callable[[], Any]:
    """One iteration on a random unit, batch 1; call by call it goes on learning."""
    images, x = len(store[2]), store[2]
    params = jax.jit(operation.module.init)(jax.random.key(1), x[0])["params"]
    recipe = recipe_of(architecture_named("sam_vit"), CONFIG)
    sites, statistics = passes.discover(operation, params, (x[0],), prefix, recipe)
    quantizers, weights = {}, {}
    for path, kind, _ in sites:
        # Grouped sites keep a range for each channel: that is how many they have.
        channels = statistics[path].minimum.size if kind == "grouped" else 1
        quantizers[path] = _quantizer(kind, channels)
        if (layer := weight_path(path)) is not None:
            node: Any = params
            for name in layer.split("/"):
                node = node[name]
            kernel = node["kernel"]
            uniform = Uniform.from_range(kernel.min(0), kernel.max(0), CONFIG.w_bits)
            codes = uniform.encode(kernel)
            weights[layer] = QuantizedWeight.from_codes(codes, uniform.scale, uniform.zero_point, CONFIG.w_bits)
    problem, state = learning.start(params, weights, quantizers, LEARNING)
    done = 0

    def run() -> Any:
        nonlocal state, done
        state, losses = learning.advance(
            problem,
            state,
            store,
            jnp.full(1, done % images),
            jnp.int32(done),
            jnp.int32(done + 1),
            jax.random.key(0),
            how=learning.Learning(operation, LocalError(loss_axis), LEARNING),
        )
        done += 1
        return losses

    return run


def mlp_step(width: int, hidden: int, side: int) -> Callable[[], Any]:
    """A reconstruction step of an encoder's MLP on side * side tokens."""
    operation = Operation(MLPBlock(width, hidden, parent=None))
    return _step(operation, "image_encoder/blocks_0/mlp/", _store(1, 1, side, side, width), 1)


def float_mlp_step(width: int, hidden: int, side: int) -> Callable[[], Any]:
    """Plain gradient descent on the kernels of the same MLP, the measure of `mlp_step`."""
    operation = Operation(MLPBlock(width, hidden, parent=None))
    x, target = jax.random.normal(jax.random.key(0), (2, 1, side, side, width))
    params = operation.module.init(jax.random.key(1), x)["params"]

    @jax.jit
    def step(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.mean(jnp.sum(jnp.square(operation(params, x) - target), axis=1))

        return jax.tree.map(lambda p, g: p - 1e-6 * g, params, jax.grad(loss)(params))

    def run() -> Any:
        nonlocal params
        params = step(params)
        return params

    return run


def block_pair_step(config: SamConfig, images: int) -> Callable[[], Any]:
    """A step of attention and MLP of one windowed and one global block, in turn, with inputs of `images` images."""
    windowed = next(i for i in range(config.depth) if config.block_window(i))
    pair = dataclasses.replace(config, depth=2, global_attn_indexes=(1,), window_size=config.block_window(windowed))
    store = _store(images, 1, config.grid, config.grid, config.embed_dim)
    units = [unit for unit in encoder_units(Sam(pair)) if unit.part != "neck"]
    steps = [_step(unit.operation, unit.prefix, store, unit.loss_axis) for unit in units]
    return lambda: [jax.block_until_ready(step()) for step in steps]
