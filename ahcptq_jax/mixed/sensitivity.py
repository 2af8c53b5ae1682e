"""How much the model's output suffers from each layer and site at each width.

With an error d in one tensor, the mask logits f change by J d, J being their derivative with respect to it. The mean of
(v^T J d)^2 over random signs v is |J d|^2. Taking the errors of different entries as independent, it is the sum of
g^2 d^2 with g = v^T J, which one backward pass gives for every tensor of the model at once: all widths of all layers
are measured together. (The same diagonal of the Fisher matrix weighs errors in BRECQ, arXiv 2102.05426.)
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ahcptq_jax.architectures.base import traced
from ahcptq_jax.architectures.sites import flatten, intercept_sites, unflatten
from ahcptq_jax.mixed.budget import Product
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.quantizers.weights import QuantizedWeight
from sam_flax.layers import in_float32
from sam_flax.sam import Params, call, parameters_at
from sam_flax.stages import Stage


class Slopes(NamedTuple):
    """What one backward pass gives.

    Attributes:
        kernels: squared slopes of the random sum of logits at the kernel of each layer.
        sites: at each site that was asked for the values there, and the squared slopes.
    """

    kernels: dict[str, jax.Array]
    sites: dict[str, tuple[jax.Array, jax.Array]]


@partial(jax.jit, static_argnames=("architecture", "sam", "layers", "sites"))
@in_float32
def slopes(
    architecture: Any,
    sam: Any,
    params: Params,
    canvas: Float[Array, "s s 3"],
    boxes: Float[Array, "p 4"],
    key: PRNGKeyArray,
    layers: tuple[str, ...],
    sites: tuple[str, ...],
) -> Slopes:
    """Slopes of a sum of all mask logits of one image with random signs, divided by the root of their number.

    The masks are the single one and the three of an ambiguous prompt. The decoder runs once for each kind, on the same
    tensors, and a slope at one of its sites is that of both runs together.

    Args:
        architecture: the model's.
        sam: the module.
        params: its floating-point parameters.
        canvas: the image, normalised and padded.
        boxes: its prompts in canvas pixels.
        key: draws the signs.
        layers: whose kernels are wanted.
        sites: whose values and slopes are wanted.
    """
    flat = flatten(params)
    values: dict[str, jax.Array] = {}

    def logits(kernels: dict[str, jax.Array], added: dict[str, jax.Array]) -> jax.Array:
        changed = unflatten(flat | {f"{layer}/kernel": kernel for layer, kernel in kernels.items()})

        def handler(prefix: str) -> Any:
            def handle(path: str, value: Any) -> Any:
                path = prefix + path
                if path not in sites:
                    return value
                values[path] = value
                return value + added[path] if path in added else value

            return handle

        def apply(stage: Stage, inputs: tuple[Any, ...]) -> Any:
            own = parameters_at(changed, stage.prefix)
            if not sites:  # then a gradient need not hold what is inside of all stages at once
                return jax.checkpoint(partial(call, stage.module))(own, *inputs)
            with intercept_sites(handler(stage.prefix)):
                return call(stage.module, own, *inputs)

        embedding = architecture.stages(sam).run(architecture.embed(sam, changed, canvas[None]), apply)
        found = []
        for multimask in (False, True):
            with intercept_sites(handler("")):
                out = call(
                    sam,
                    architecture.decoder(changed),
                    embedding,
                    None,
                    boxes,
                    method="decode",
                    multimask_output=multimask,
                )
            found.append(out[0].reshape(-1))
        return jnp.concatenate(found)

    kernels = {layer: flat[f"{layer}/kernel"] for layer in layers}
    shapes = jax.eval_shape(lambda k: (logits(k, {}), dict(values))[1], kernels)
    values.clear()
    added = {path: jnp.zeros(shape.shape) for path, shape in shapes.items()}

    def signed(kernels: dict[str, jax.Array], added: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        out = logits(kernels, added)
        signs = jax.random.rademacher(key, out.shape, out.dtype)
        return jnp.sum(signs * out) / np.sqrt(out.size), dict(values)

    (by_kernel, by_site), seen = jax.grad(signed, argnums=(0, 1), has_aux=True)(kernels, added)
    squared = {path: (seen[path], jnp.square(slope)) for path, slope in by_site.items()}
    return Slopes(jax.tree.map(jnp.square, by_kernel), squared)


@jax.jit
@in_float32
def kernel_damage(kernel: jax.Array, squared: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """The sum of g^2 d^2 over a kernel, d being what its codes miss."""
    return jnp.sum(squared * jnp.square(weight.decode() - kernel))


@jax.jit
@in_float32
def site_damage(value: jax.Array, squared: jax.Array, quantizer: Quantizer) -> jax.Array:
    """The sum of g^2 d^2 over the values at a site, d being what its quantizer adds."""
    return jnp.sum(squared * jnp.square(quantizer.fake_quant(value) - value))


def products(architecture: Any, sam: Any, params: Params, boxes: int, sites: Sequence[str]) -> list[Product]:
    """All products of a model whose left operand is one of the quantized sites, with their sizes, for one image.

    Args:
        architecture: the model's.
        sam: the module.
        params: its parameters.
        boxes: prompts of the image.
        sites: the quantized sites.
    """
    shapes, strided = traced(architecture, sam, boxes)
    flat, found = flatten(params), []
    for site in sites:
        if site.endswith("/input"):
            layer = site.removesuffix("/input")
            kernel = flat[f"{layer}/kernel"].shape
            rows = int(np.prod(strided.get(layer, shapes[site])[:-1]))
            found.append(Product(site, None, int(np.prod(kernel)), rows * int(np.prod(kernel))))
        elif site.endswith("/q"):
            q, k = shapes[site], shapes[site.removesuffix("q") + "k"]
            macs = int(np.prod(q[:-1])) * k[-2] * q[-1]
            found.append(Product(site, site.removesuffix("q") + "k", 0, macs))
            v = shapes[site.removesuffix("q") + "v"]
            macs = int(np.prod(q[:-1])) * k[-2] * v[-1]
            found.append(Product(site.removesuffix("q") + "v", site.removesuffix("q") + "softmax", 0, macs))
    return found


def measured(
    found: Mapping[str, Mapping[int, float]],
    slopes: Slopes,
    weights: Mapping[int, Mapping[str, QuantizedWeight]],
    activations: Mapping[int, Mapping[str, Quantizer]],
    params: Params,
) -> dict[str, dict[int, float]]:
    """The damages so far, by layer or site and width, with those of one more image.

    Args:
        found: damages so far.
        slopes: of the image.
        weights: for each width the layers' weights.
        activations: for each width the quantizers of the sites that `slopes` has.
        params: the floating-point parameters that were quantized.
    """
    flat, result = flatten(params), {path: dict(of) for path, of in found.items()}

    def add(path: str, bits: int, damage: jax.Array) -> None:
        of_path = result.setdefault(path, {})
        of_path[bits] = of_path.get(bits, 0.0) + float(damage)

    for layer, squared in slopes.kernels.items():
        for bits, of_width in weights.items():
            add(layer, bits, kernel_damage(flat[f"{layer}/kernel"], squared, of_width[layer]))
    for site, (value, squared) in slopes.sites.items():
        for bits, quantizers in activations.items():
            add(site, bits, site_damage(value, squared, quantizers[site]))
    return result
