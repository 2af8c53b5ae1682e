"""The statistics of quantized sites: each site's kind updates them batch by batch and makes a quantizer of them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ahcptq_jax import devices
from ahcptq_jax.architectures import Architecture
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.quantizers.kinds import Observation, Statistic, kind_named
from ahcptq_jax.quantizers.searches.batches import draw_rows
from sam_flax.sam import Params


class SiteRule(NamedTuple):
    """The kind and width of a site's quantizer. Hashable, because it is part of a static argument of `jax.jit`.

    Attributes:
        path: the site's.
        kind: name of the quantizer kind.
        bits: width of its codes.
    """

    path: str
    kind: str
    bits: int

    @property
    def is_attention(self) -> bool:
        """Whether it is the softmax of an attention."""
        return self.path.endswith("/softmax")


def relevant(rules: Iterable[SiteRule], settings: QuantConfig) -> tuple[tuple[SiteRule, ...], QuantConfig]:
    """The rules and settings with defaults for all that their statistics do not depend on.

    They are the key of a compilation and of a pass over the images, so that runs which differ in nothing that a
    statistic reads share both.
    """
    default, kept, needed = QuantConfig(), [], set()
    for rule in rules:
        names = kind_named(rule.kind).statistic.depends_on(settings, rule.is_attention)
        kept.append(rule if "bits" in names else rule._replace(bits=default.a_bits))
        needed |= {*names} - {"bits"}
    return tuple(kept), dataclasses.replace(default, **{name: getattr(settings, name) for name in needed})


def attention_map(
    architecture: Architecture, operands: tuple[Float[Array, "..."], ...], rows: int, key: PRNGKeyArray
) -> tuple[Float[Array, "*g m n"], Float[Array, "*g n d"]]:
    """Probabilities and values of an attention, for at most `rows` queries drawn by `key` (0: all).

    Args:
        architecture: the model's; it says what its attentions do with their biases.
        operands: the values at the `operands` site: q, k, v, each (..., T, d), and the module's biases, if any.
        rows: the most queries.
        key: draws them.
    """
    q, k, v, *biases = operands
    picked = draw_rows(q.shape[-2], rows, key)
    if picked is not None:
        q, biases = q[..., picked, :], [b[..., picked, :] for b in biases]
    return architecture.attention_map(q, k, *biases), v


def _kernel_of(params: Params, layer: str) -> Array:
    node: Any = params
    for name in layer.split("/"):
        node = node[name]
    return node["kernel"]


def init_statistics(rule: SiteRule, shape: tuple[int, ...], settings: QuantConfig) -> Any:
    """Statistics of a site of this shape before the first batch."""
    return kind_named(rule.kind).statistic.init(shape, rule.bits, settings)


class Together(NamedTuple):
    """The images that the devices of a row look at in one round, as one of the devices sees it; traced.

    Attributes:
        size: the number of devices.
        place: this one's in the row.
        first, last: the places whose images count are `first` to `last - 1`; others are there to fill up.
    """

    size: int
    place: jax.Array
    first: jax.Array
    last: jax.Array

    def gathered(self, tree: Any) -> Any:
        """Every leaf of all devices, stacked in their order; one exchange for each type of number."""
        leaves, structure = jax.tree.flatten(tree)
        found: list[Any] = [None] * len(leaves)
        for dtype in sorted({str(leaf.dtype) for leaf in leaves}):
            of_type = [i for i, leaf in enumerate(leaves) if str(leaf.dtype) == dtype]
            everyone = jax.lax.all_gather(jnp.concatenate([leaves[i].reshape(-1) for i in of_type]), devices.AXIS)
            ends = np.cumsum([leaves[i].size for i in of_type])[:-1]
            for i, part in zip(of_type, jnp.split(everyone, ends, axis=1), strict=True):
                found[i] = part.reshape(self.size, *leaves[i].shape)
        return jax.tree.unflatten(structure, found)

    def merged(self, statistic: Statistic, before: Any, batches: Any, end: jax.Array) -> Any:
        """The state with the images that count before place `end`, in their order."""

        def add(place: jax.Array, state: Any) -> Any:
            more = statistic.merge(state, jax.tree.map(lambda leaf: leaf[place], batches))
            counts = (self.first <= place) & (place < jnp.minimum(self.last, end))
            return jax.tree.map(lambda new, old: jnp.where(counts, new, old), more, state)

        return jax.lax.fori_loop(0, self.size, add, before)


def update_statistics(
    states: Mapping[str, Any],
    rules: Sequence[SiteRule],
    captured: Mapping[str, Any],
    params: Params,
    key: PRNGKeyArray,
    settings: QuantConfig,
    architecture: Architecture,
    together: Together | None = None,
) -> dict[str, Any]:
    """The statistics of the sites of a part of the model, by path, after one more batch; or a batch of every device.

    Args:
        states: the statistics before it.
        rules: the sites'.
        captured: what all sites of the part saw in the batch, by path.
        params: the part's, for statistics that look at the kernel behind a site.
        key: for random choices.
        settings: the statistics'.
        architecture: the model's.
        together: the round, if other devices look at other images meanwhile; then the states are theirs, too.
    """
    kinds = {rule.path: kind_named(rule.kind).statistic for rule in rules}
    seen = {
        rule.path: _observation(rule, captured, params, site_key, architecture)
        for rule, site_key in zip(rules, jax.random.split(key, len(rules)), strict=True)
    }
    if together is None:
        return {r.path: kinds[r.path].update(states[r.path], seen[r.path], r.bits, settings) for r in rules}
    outlines = {}
    for path, statistic in kinds.items():
        if statistic.outline is not None:
            empty = jax.tree.map(jnp.zeros_like, states[path])
            outlines[path] = statistic.outline(empty, seen[path])
    before = dict(states)
    for path, of_all in together.gathered(outlines).items():
        before[path] = together.merged(kinds[path], states[path], of_all, together.place)
    batches = {r.path: kinds[r.path].of_batch(before[r.path], seen[r.path], r.bits, settings) for r in rules}
    everyone = together.gathered(batches)
    end = jnp.int32(together.size)
    return {path: together.merged(kinds[path], states[path], of_all, end) for path, of_all in everyone.items()}


def _observation(
    rule: SiteRule, captured: Mapping[str, Any], params: Params, key: PRNGKeyArray, architecture: Architecture
) -> Observation:
    """What the statistic of a site is given of a batch."""
    if rule.is_attention:
        operands = captured[rule.path.removesuffix("softmax") + "operands"]
        return Observation(key, attention=lambda queries: attention_map(architecture, operands, queries, key))
    layer = rule.path.removesuffix("/input")
    kernel = _kernel_of(params, layer) if layer != rule.path else None
    return Observation(key, activations=captured[rule.path], kernel=kernel)


def finalize(
    statistics: Mapping[str, Any], rules: Iterable[SiteRule], settings: QuantConfig, grid_bits: int
) -> dict[str, Quantizer]:
    """Statistics by site -> quantizers by site, on the integer grid of so many bits; 0 leaves them off it.

    All sites of a kind and width are finished in one call.
    """
    together: dict[tuple[str, int], dict[str, Any]] = {}
    for rule in rules:
        together.setdefault((rule.kind, rule.bits), {})[rule.path] = statistics[rule.path]
    quantizers: dict[str, Quantizer] = {}
    for (kind, bits), states in together.items():
        found = kind_named(kind).statistic.finalize(states, bits, settings)
        if grid_bits:
            found = {path: kind_named(kind).on_grid(q, grid_bits) for path, q in found.items()}
        quantizers |= found
    return quantizers
