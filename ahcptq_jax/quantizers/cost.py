"""What a cost model must count of a kind of quantizer, as data: hwcost reads it and knows no kind by name."""

import dataclasses
from typing import Literal

# What a processing element does with a pair of a weight code and an activation code in the paper's own form:
#   "multiply"           a multiply-accumulate of the codes
#   "shift"              codes are exponents: a shift and an add into the accumulator of the code's residue mod `tau`
#   "shift_or_multiply"  some codes are exponents, the others multiply: two accumulators
Arithmetic = Literal["multiply", "shift", "shift_or_multiply"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What one quantizer costs besides its codes.

    Attributes:
        scales: numbers in floating point that it stores, for each group of channels.
        codes: numbers of the width of its codes that it stores, for each group.
        more_bits: bits besides those, for each group.
        per_group: whether it may have several groups of channels; then each channel stores the label of its group
            and each group has an accumulator of its own.
        multiples: on the integer grid, the scale of a group is a whole multiple of one step, up to this one.
        arithmetic: what its codes make a processing element do.
        code_field: the quantizer's field without which a histogram of its codes cannot be read ("log_levels": how many
            are exponents; "tau": levels per octave); "" where there is none.
        table_bits: not 0 where codes have no arithmetic of their own even in the paper's form: a table at the edge of
            the array turns them into numbers of so many bits.
    """

    scales: int = 1
    codes: int = 1
    more_bits: int = 0
    per_group: bool = False
    multiples: int = 1
    arithmetic: Arithmetic = "multiply"
    code_field: str = ""
    table_bits: int = 0

    @property
    def depends_on_codes(self) -> bool:
        """Whether how often each code occurs changes what is done."""
        return self.arithmetic != "multiply"


UNIFORM = Cost()
GROUPED = Cost(per_group=True, multiples=8)
HYBRID = Cost(scales=3, arithmetic="shift_or_multiply", code_field="log_levels")  # minimum and two scales
LOG2 = Cost(codes=0, more_bits=2, arithmetic="shift", code_field="tau")  # tau is one of three
TABLE = Cost(scales=2, codes=0, table_bits=8)  # alpha and scale
