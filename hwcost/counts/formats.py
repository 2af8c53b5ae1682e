"""The number format of every site and weight: the one place where the cost model asks the recipe and the kinds."""

from ahcptq_jax.config import GRIDS, QuantConfig
from ahcptq_jax.quantizers.cost import Cost
from ahcptq_jax.quantizers.kinds import kind_named
from ahcptq_jax.recipe import site_kind
from hwcost.counts.costs import Operand
from sam_flax.errors import InputError


def site_format(path: str, quant: QuantConfig | None, float_bits: int, grid_bits: int = 0) -> Operand:
    """Format of the activations behind a site.

    Args:
        path: of the site.
        quant: the quantization; None in floating point.
        float_bits: width of what stays in floating point.
        grid_bits: width of the levels that codes stand for, unless a uniform step makes the codes themselves levels;
            0 is the paper's own form, without a grid.
    """
    kind = None if quant is None else site_kind(path, quant)
    if kind is None or quant is None:
        return Operand(float_bits)
    cost = kind_named(kind).cost
    if not grid_bits or not (cost.per_group or cost.depends_on_codes):
        return Operand(quant.a_bits, cost)
    return Operand(quant.a_bits, cost, grid_bits, _table_address(cost, quant.groups, quant.a_bits, grid_bits))


def check_grid_bits(grid_bits: int, quant: QuantConfig | None) -> None:
    """Raises InputError unless levels of a width exist and codes of the quantization's width can stand for them."""
    if grid_bits not in (0, *GRIDS):
        raise InputError(
            f"grid_bits={grid_bits} must be {', '.join(map(str, GRIDS))}, or 0 for the paper's form without a grid."
        )
    if grid_bits and quant is not None and quant.a_bits > grid_bits:
        raise InputError(
            f"grid_bits={grid_bits} has no room for activations of a_bits={quant.a_bits}; give at least as many, or 0 "
            "for the paper's form without a grid."
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


def weight_format(input_operand: Operand, quant: QuantConfig | None, float_bits: int) -> Operand:
    """Format of the weights of a layer whose input has a format: codes exactly where the input is codes."""
    if input_operand.is_float or quant is None:
        return Operand(float_bits)
    return Operand(quant.w_bits, Cost())
