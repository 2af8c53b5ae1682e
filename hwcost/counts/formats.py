"""The number format of every site and weight: the one place where the cost model asks the recipe and the kinds."""

from ahcptq_jax.config import QuantConfig
from ahcptq_jax.quantizers import Grouped, Hybrid, Log2, Quantizer, Uniform, cost
from ahcptq_jax.quantizers.cost import Cost
from ahcptq_jax.recipe import site_kind
from hwcost.counts.costs import Operand

_COSTS = {"uniform": cost.UNIFORM, "grouped": cost.GROUPED, "hybrid": cost.HYBRID, "log2": cost.LOG2}
_CLASSES = {Uniform: cost.UNIFORM, Grouped: cost.GROUPED, Hybrid: cost.HYBRID, Log2: cost.LOG2}


def quantizer_cost(quantizer: Quantizer) -> Cost:
    """What a quantizer's kind costs."""
    return _CLASSES[type(quantizer)]


def site_format(path: str, quant: QuantConfig | None, float_bits: int) -> Operand:
    """Format of the activations behind a site.

    Args:
        path: of the site.
        quant: the quantization; None in floating point.
        float_bits: width of what stays in floating point.
    """
    kind = None if quant is None else site_kind(path, quant)
    return Operand(float_bits) if kind is None or quant is None else Operand(quant.a_bits, _COSTS[kind])


def weight_format(input_operand: Operand, quant: QuantConfig | None, float_bits: int) -> Operand:
    """Format of the weights of a layer whose input has a format: codes exactly where the input is codes."""
    if input_operand.is_float or quant is None:
        return Operand(float_bits)
    return Operand(quant.w_bits, cost.UNIFORM)
