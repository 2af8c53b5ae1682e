"""The recipe of one quantization, as data: which site gets which quantizer and widths, and which transforms come first.

The rules are the user's own (`QuantConfig.rules`), then those of the model's architecture. For each of kind, activation
bits and weight bits, the first rule that matches a site and says something about it decides.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from ahcptq_jax.architectures import Architecture, architecture_named
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers.kinds import kind_named
from ahcptq_jax.rules import FLOAT, Rule

Kind = str

# Kind -> the switch of `QuantConfig` that turns it off in an architecture's rules, and leaves uniform in its place.
SWITCHES = {"hybrid": "hluq", "grouped": "cag", "log2": "agq"}
# Kind -> the switch that puts another kind in its place, and that kind.
REPLACED = {"log2": ("lnq", "log_nonlinear")}
# The sites of an attention whose ranges PCC chooses, each with one scale, in the order of its search.
FOCUSED = ("q_proj/input", "k_proj/input", "q", "k")
# The switch of `QuantConfig` -> the transform that it adds, in their order.
TRANSFORMED = {"big": "bimodal", "refit": "refit", "acnr": "acnr"}


class Choice(NamedTuple):
    """The kind and bits of a site's quantizer, and the bits of the weights that are multiplied with it, if any are."""

    kind: Kind
    a_bits: int
    w_bits: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules in order of precedence, and the settings that they leave open. Hashable.

    Attributes:
        rules: the first that says something about a site decides.
        config: widths where no rule gives one; settings of the searches.
        transforms: names of the transforms that rewrite the parameters first, in order; see the package `transforms`.
        off_grid: whether quantizers stay off the grid, whose bits the searches are told nevertheless.
    """

    rules: tuple[Rule, ...]
    config: QuantConfig
    transforms: tuple[str, ...] = ()
    off_grid: bool = False

    @property
    def grid_bits(self) -> int:
        """Bits of the grid that quantizers are put on; 0 for none."""
        return 0 if self.off_grid else self.config.grid_bits

    def at(self, path: str) -> Choice | None:
        """The choice for the site of this path; None if it stays in floating point."""
        kind, a_bits, w_bits = None, None, None
        for rule in self.rules:
            if rule.matches(path):
                kind = rule.kind if kind is None else kind
                a_bits = rule.a_bits if a_bits is None else a_bits
                w_bits = rule.w_bits if w_bits is None else w_bits
        if kind is None or kind == FLOAT:
            return None
        return Choice(kind, a_bits or self.config.a_bits, w_bits or self.config.w_bits)

    def idle(self, paths: Iterable[str]) -> list[Rule]:
        """The rules that match none of the sites."""
        sites = list(paths)
        return [rule for rule in self.rules if not any(rule.matches(path) for path in sites)]

    def unnamed(self, paths: Iterable[str]) -> list[str]:
        """The sites of which no rule says a kind: they stay in floating point, perhaps by oversight."""
        return [path for path in paths if not any(rule.kind and rule.matches(path) for rule in self.rules)]


def recipe_of(architecture: Architecture, config: QuantConfig) -> Recipe:
    """The recipe of a configuration for an architecture, whose rules come last and obey the method's switches.

    Raises:
        InputError: if a rule of the configuration's has an unknown kind.
    """
    for rule in config.rules:
        if rule.kind not in (None, FLOAT):
            kind_named(rule.kind)
    rules = [*config.rules]
    if config.pcc and architecture.focused is not None:
        rules += [Rule(f"(?:{architecture.focused})/{leaf}", "uniform") for leaf in FOCUSED]
    for rule in architecture.rules:
        rules.append(dataclasses.replace(rule, kind=_switched(rule.kind, config)))
    transforms = [*architecture.transforms, *config.transforms]
    transforms += [name for switch, name in TRANSFORMED.items() if getattr(config, switch)]
    return Recipe(tuple(rules), config, tuple(transforms))


def _switched(kind: Kind | None, config: QuantConfig) -> Kind | None:
    """What the method's switches make of an architecture's kind."""
    switch, other = REPLACED.get(kind or "", ("", kind))
    if switch and getattr(config, switch):
        return other
    switch = SWITCHES.get(kind or "", "")
    return kind if not switch or getattr(config, switch) else "uniform"


def site_kind(path: str, config: QuantConfig, architecture: str) -> Kind | None:
    """The kind of a site's quantizer in the architecture of this name, after the method's switches; None for float."""
    choice = recipe_of(architecture_named(architecture), config).at(path)
    return None if choice is None else choice.kind


def weight_path(site: str) -> str | None:
    """The linear or convolution whose input this site is, or None for the sites inside attention."""
    return site.removesuffix("/input") if site.endswith("/input") else None
