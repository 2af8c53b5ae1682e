"""The statistics of quantized sites: each site's kind updates them batch by batch and makes a quantizer of them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ahcptq_jax.architectures import Architecture
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.quantizers.kinds import Observation, kind_named
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

    @property
    def seen(self) -> str:
        """The path of the site whose values the statistic looks at: of a softmax what it is made of."""
        return self.path.removesuffix("softmax") + "operands" if self.is_attention else self.path


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


def outlines(
    states: Mapping[str, Any],
    rules: Iterable[SiteRule],
    captured: Mapping[str, Any],
    params: Params,
    architecture: Architecture,
) -> dict[str, Any]:
    """What of a batch the statistics of later ones look at, for the sites where they do; see `Statistic.outline`."""
    found = {}
    unused = jax.random.key(0)
    for rule in rules:
        outline = kind_named(rule.kind).statistic.outline
        if outline is not None:
            empty = jax.tree.map(jnp.zeros_like, states[rule.path])
            found[rule.path] = outline(empty, _observation(rule, captured, params, unused, architecture))
    return found


def batch_statistics(
    before: Mapping[str, Any],
    rules: Sequence[SiteRule],
    captured: Mapping[str, Any],
    params: Params,
    key: PRNGKeyArray,
    settings: QuantConfig,
    architecture: Architecture,
) -> dict[str, Any]:
    """The statistics of the sites of a part of the model in one batch alone, by path.

    Args:
        before: the states after the batches before it, at least of the sites that have outlines.
        rules: the sites'.
        captured: what the sites saw in the batch, by `SiteRule.seen`.
        params: the part's, for statistics that look at the kernel behind a site.
        key: for random choices.
        settings: the statistics'.
        architecture: the model's.
    """
    found = {}
    for rule, site_key in zip(rules, jax.random.split(key, len(rules)), strict=True):
        observed = _observation(rule, captured, params, site_key, architecture)
        statistic = kind_named(rule.kind).statistic
        found[rule.path] = statistic.of_batch(before.get(rule.path), observed, rule.bits, settings)
    return found


def merged(rules: Iterable[SiteRule], states: Mapping[str, Any], batches: Mapping[str, Any]) -> dict[str, Any]:
    """The states with one more batch, at the sites of which `batches` says something."""
    of_sites = {rule.path: kind_named(rule.kind).statistic for rule in rules}
    return {path: of_sites[path].merge(states[path], batch) for path, batch in batches.items()}


def _observation(
    rule: SiteRule, captured: Mapping[str, Any], params: Params, key: PRNGKeyArray, architecture: Architecture
) -> Observation:
    """What the statistic of a site is given of a batch."""
    if rule.is_attention:
        operands = captured[rule.seen]
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
