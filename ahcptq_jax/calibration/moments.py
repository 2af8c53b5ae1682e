"""Second moments of the inputs of linears, and of what quantization adds to them, layer by layer.

Transforms that look at a layer's inputs are given these, and no activations: a pass over the images runs each stage in
both models and keeps one (in, in) matrix of each kind for each linear of that stage.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from ahcptq_jax.architectures import architecture_of
from ahcptq_jax.architectures.base import Operation
from ahcptq_jax.architectures.sites import below, flatten, intercept_sites, unflatten
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.runtime.quantized import Quantized, with_decoded
from ahcptq_jax.transforms import Moments
from sam_flax.layers import in_float32
from sam_flax.sam import Params
from sam_flax.stages import EMBEDDED, dead_after, joined

Sums = dict[str, Moments]


@partial(jax.jit, static_argnames=("run", "layers"))
@in_float32
def _both(
    run: Operation,
    params: Params,
    decoded: Params,
    activations: Mapping[str, Quantizer],
    clean: tuple[Any, ...],
    noisy: tuple[Any, ...],
    layers: tuple[str, ...],
) -> tuple[Any, Any, Sums]:
    """The outputs of a part of the floating-point model and of the quantized one, and the sums of its layers."""
    seen: dict[str, jax.Array] = {}
    added: Sums = {}

    def keep(path: str, value: Any) -> Any:
        if path.removesuffix("/input") in layers:
            seen[path] = value.reshape(-1, value.shape[-1])
        return value

    def compare(path: str, value: Any) -> Any:
        if path not in activations:
            return value
        rounded = activations[path].fake_quant(value)
        if path in seen:
            error = seen[path] - rounded.reshape(seen[path].shape)
            found = Moments(seen[path].T @ seen[path], error.T @ error, jnp.float32(len(error)))
            added[path.removesuffix("/input")] = found
        return rounded

    with intercept_sites(keep):
        target = run(params, *clean)
    with intercept_sites(compare):
        output = run(decoded, *noisy)
    return target, output, added


def layer_moments(
    params: Params,
    quantized: Quantized,
    canvases: Sequence[Float32[np.ndarray, "s s 3"]],
    boxes: Sequence[Float32[np.ndarray, "p 4"]],
    bar: Callable[[Sequence[Any], str], Any],
) -> Iterator[tuple[str, Moments]]:
    """The moments of every quantized linear in the order of the stages, each divided by the number of rows.

    Args:
        params: in floating point, those that were quantized.
        quantized: the calibrated model, whose quantized layers and activations make the errors.
        canvases: normalised and padded images.
        boxes: for each its prompts, in canvas pixels.
        bar: shows progress over what it is given.
    """
    sam = quantized.sam
    architecture, flat = architecture_of(sam), flatten(params)
    linear = {layer for layer in quantized.weights if flat[f"{layer}/kernel"].ndim == 2}
    decoded = flatten(with_decoded(quantized.params, quantized.weights))
    graph = architecture.stages(sam)
    steps = [(stage.key, stage.inputs) for stage in graph.stages]
    embedded = [jax.device_get(architecture.embed(sam, params, jnp.asarray(canvas[None]))) for canvas in canvases]
    values: dict[str, list[tuple[Any, Any]]] = {EMBEDDED: [(value, value) for value in embedded]}
    for stage, over in zip(bar(graph.stages, "moments encoder"), dead_after(steps, graph.outputs), strict=True):
        layers = tuple(sorted(layer for layer in below(stage.prefix, dict.fromkeys(linear))))
        own, theirs = (unflatten(below(stage.prefix, of)) for of in (flat, decoded))
        activations = below(stage.prefix, quantized.activations)
        sums: Sums = {}
        made = []
        for pairs in zip(*(values[name] for name in stage.inputs), strict=True):
            clean, noisy = (tuple(pair[index] for pair in pairs) for index in (0, 1))
            *outputs, added = _both(Operation(stage.module), own, theirs, activations, clean, noisy, layers)
            made.append(tuple(jax.tree.map(np.asarray, output) for output in outputs))
            sums = _plus(sums, added)
        values[stage.key] = made
        for name in over:
            del values[name]
        yield from ((stage.prefix + layer, _mean(found)) for layer, found in sums.items())
    layers = tuple(sorted(layer for layer in linear if not architecture.is_encoder(layer)))
    own, theirs = architecture.decoder(params), architecture.decoder(unflatten(decoded))
    ends = [values[name] for name in graph.outputs]
    sums = {}
    for index, prompts in enumerate(bar(list(boxes), "moments decoder")):
        clean, noisy = (tuple(of_image[index][model] for of_image in ends) for model in (0, 1))
        prompted = (None, jnp.asarray(prompts))
        both = [(joined(embedding), *prompted) for embedding in (clean, noisy)]
        _, _, added = _both(Operation(sam, "decode"), own, theirs, quantized.activations, *both, layers)
        sums = _plus(sums, added)
    yield from ((layer, _mean(found)) for layer, found in sums.items())


def _plus(sums: Sums, added: Sums) -> Sums:
    return {name: jax.tree.map(jnp.add, sums[name], found) if name in sums else found for name, found in added.items()}


def _mean(sums: Moments) -> Moments:
    inputs, errors, rows = (np.asarray(a, np.float64) for a in sums)
    return Moments(_symmetric(inputs / rows), _symmetric(errors / rows), rows)


def _symmetric(matrix: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    return (matrix + matrix.T) / 2
