"""What a processing element does with the codes of a quantized operand, by the arithmetic of their kind:

    multiply            A += w*a                                       one multiply-accumulate
    shift               A[k mod tau] += v << (K - k div tau)           one shift and one add; nothing for zero
    shift_or_multiply   exponent:  L += w << (K - k)                   one shift and one add; nothing for zero
                        otherwise: L += w << K and U += w*u            one multiply-accumulate and a second add

The names are those of `ahcptq_jax.quantizers.cost.Arithmetic`; AGQ's softmax shifts, HLUQ shifts or multiplies.
"""

import dataclasses

from hwcost.counts.codes import AssumedCodes, Histogram, Shares, hybrid_shares, log2_shares
from hwcost.counts.costs import Operand, Ops
from sam_flax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What the processing element does in one product.

    Attributes:
        shares: fractions of the left operand's codes that shift, are zero and multiply.
        accumulators: partial sums for each output that are rescaled apart.
        log_levels: codes that are exponents, where only some are; else 0.
        adds_twice: whether a code that multiplies adds to a second sum as well.
    """

    shares: Shares = Shares(multiply=1.0)
    accumulators: int = 1
    log_levels: int = 0
    adds_twice: bool = False

    def ops(self, macs: int, outputs: int, sums: int) -> Ops:
        """Operations of a product.

        Args:
            macs: pairs of operands.
            outputs: numbers that it makes.
            sums: adds for the sums of the operands that its zero points need.
        """
        shifts, skipped = round(macs * self.shares.shift), round(macs * self.shares.zero)
        int_macs = macs - shifts - skipped
        return Ops(
            macs=macs,
            int_macs=int_macs,
            shifts=shifts,
            skipped=skipped,
            dual_adds=int_macs if self.adds_twice else 0,
            corrections=sums + 2 * outputs * self.accumulators,
            rescales=outputs * self.accumulators,
        )


def _check(histogram: Histogram, path: str, operand: Operand) -> None:
    """Raises InputError if a site's histogram was measured at another width, or on codes of another kind."""
    if len(histogram.counts) != 2**operand.bits:
        raise InputError(
            f"The histogram of {path} has {len(histogram.counts)} codes, not 2^{operand.bits}; measure the codes at "
            "the bits that are counted."
        )
    needed = operand.cost.code_field if operand.cost else ""
    given = {name for name in ("log_levels", "tau") if getattr(histogram, name) is not None}
    if given - {needed}:
        raise InputError(
            f"The histogram of {path} has {', '.join(sorted(given))}, but that site's codes need {needed}; give the "
            "histograms measured on this model."
        )


def work_of(operand: Operand, path: str, histogram: Histogram | None, assumed: AssumedCodes) -> Work:
    """What the element does with the codes of a site whose arithmetic depends on them.

    Args:
        operand: the site's format.
        path: the site, for messages.
        histogram: how often each of its codes occurs; None takes what is assumed, and so does a missing tau.
        assumed: the shares of sites without a histogram.

    Raises:
        InputError: if the histogram has another width, is of another kind, or lacks the number of its exponents.
        ValueError: if the arithmetic is unknown.
    """
    if histogram is not None:
        _check(histogram, path, operand)
    if operand.level_bits:
        return Work()  # every code is a level, however often it occurs
    if operand.arithmetic == "shift_or_multiply":
        if histogram is None:
            levels = assumed.log_levels(operand.bits)
            return Work(shares=assumed.hybrid, accumulators=2, log_levels=levels, adds_twice=True)
        shares = hybrid_shares(histogram)
        return Work(shares=shares, accumulators=2, log_levels=histogram.log_levels or 0, adds_twice=True)
    if operand.arithmetic == "shift":
        if histogram is None:
            return Work(shares=assumed.log2, accumulators=assumed.tau)
        return Work(shares=log2_shares(histogram), accumulators=histogram.tau or assumed.tau)
    raise ValueError(f"No element is known for the arithmetic {operand.arithmetic!r} of {path}.")
