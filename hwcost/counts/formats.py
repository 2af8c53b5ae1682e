"""The number format of every site and weight: the one place where the cost model asks the recipe and the kinds."""

import dataclasses
import functools
from typing import Any

from ahcptq_jax.architectures import architecture_named, architecture_of, module_of
from ahcptq_jax.config import GRIDS, QuantConfig
from ahcptq_jax.quantizers.cost import Cost
from ahcptq_jax.quantizers.kinds import kind_named
from ahcptq_jax.recipe import Recipe, recipe_of
from hwcost.counts.costs import Operand
from sam_flax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Formats:
    """Where the formats of one model at one quantization are asked for.

    Attributes:
        quant: the quantization; None in floating point.
        architecture: the name of the model's family, whose rules are the recipe's last.
        float_bits: width of what stays in floating point.
        grid_bits: width of the levels that codes stand for, unless a uniform step makes the codes themselves levels;
            0 is the paper's own form, without a grid.
    """

    quant: QuantConfig | None
    architecture: str
    float_bits: int
    grid_bits: int = 0

    @functools.cached_property
    def recipe(self) -> Recipe | None:
        """Which site gets which kind and widths; None in floating point."""
        return None if self.quant is None else recipe_of(architecture_named(self.architecture), self.quant)

    def site(self, path: str) -> Operand:
        """Format of the activations behind a site.

        Raises:
            InputError: if its codes are wider than the levels on the grid.
        """
        choice = None if self.recipe is None else self.recipe.at(path)
        if choice is None or self.quant is None:
            return Operand(self.float_bits)
        bits, cost = choice.a_bits, kind_named(choice.kind).cost
        if 0 < self.grid_bits < bits:
            raise InputError(
                f"grid_bits={self.grid_bits} has no room for the {bits}-bit codes of {path}; give at least as many, or "
                "0 for the paper's form without a grid."
            )
        level_bits = self.grid_bits or cost.table_bits
        has_table = cost.table_bits or (self.grid_bits and (cost.per_group or cost.depends_on_codes))
        if not has_table:
            return Operand(bits, cost)
        return Operand(bits, cost, level_bits, _table_address(cost, self.quant.groups, bits, level_bits))

    def weight(self, site: str) -> Operand:
        """Format of the weights of the layer behind a site: codes exactly where its input is codes."""
        choice = None if self.recipe is None else self.recipe.at(site)
        return Operand(self.float_bits) if choice is None else Operand(choice.w_bits, Cost())


def architecture_name(sam_config: Any) -> str:
    """The name of the family of models that a configuration belongs to."""
    return architecture_of(module_of(sam_config)).name


def check_grid_bits(grid_bits: int) -> None:
    """Raises InputError unless levels of a width exist."""
    if grid_bits not in (0, *GRIDS):
        raise InputError(
            f"grid_bits={grid_bits} must be {', '.join(map(str, GRIDS))}, or 0 for the paper's form without a grid."
        )


def _table_address(cost: Cost, groups: int, bits: int, grid_bits: int) -> int:
    """Bits of a code and of the part of the table that a group of channels reads.

    There is a part for each multiple of the step that the groups of one site can have, up to a power of two. A group's
    scale is a whole multiple of the step, so that many groups share a part; the last code times the multiple must be a
    level. Zero points need no part of their own: their products with the weights are known beforehand.

    Args:
        cost: of the site's kind.
        groups: of channels; 0 is one for each channel.
        bits: width of the codes.
        grid_bits: width of the levels.
    """
    most = min(cost.multiples, (2**grid_bits - 1) // (2**bits - 1), groups or cost.multiples)
    return bits + (most - 1).bit_length()
