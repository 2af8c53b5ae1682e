"""Everything that one run of the command works out."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ahcptq_jax.config import QuantConfig
from hwcost.board.accelerator import Accelerator
from hwcost.board.constants import CONSTANTS, Constants
from hwcost.board.estimate import RESOURCES
from hwcost.counts.codes import Histogram
from hwcost.counts.counts import Counts
from hwcost.study.compare import Comparison, compare
from hwcost.study.ledger import Entry, ledger
from hwcost.study.sensitivity import Sensitivity, all_sensitivities
from hwcost.study.variants import METHOD, TWO_PATH, Variant, forms, variants
from sam_flax.config import SamConfig

# What the papers speak of; other models are set beside their claims and the pages say so.
CLAIMED = "SAM-L at W4A4"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """One model at one quantization on one board.

    Attributes:
        title: "vit_l W4A4 (8-bit grid) on ZCU102".
        is_claimed: whether the papers' figures are about this model and these bits.
        accelerator: the board.
        constants: what it was run with.
        comparison: all variants.
        sensitivities: form of the method (`forms`) -> what the constants and the assumed shares of codes do to its
            gain, the largest first.
        entries: the claim ledger.
    """

    title: str
    is_claimed: bool
    accelerator: Accelerator
    constants: Constants
    comparison: Comparison
    sensitivities: dict[str, list[Sensitivity]]
    entries: list[Entry]

    @property
    def counts(self) -> Counts:
        """Of the method."""
        return self.comparison.variants[METHOD].counts

    @property
    def variants(self) -> dict[str, Variant]:
        """Everything that was compared, by name."""
        return self.comparison.variants

    @property
    def forms(self) -> tuple[str, ...]:
        """The names of the method's forms: the one asked for, then the one beside it."""
        return forms(self.variants)

    @property
    def paper_counts(self) -> Counts:
        """Of the paper's form, whose arithmetic depends on the codes."""
        return self.variants[TWO_PATH if TWO_PATH in self.variants else METHOD].counts


def study_of(
    model: str,
    sam_config: SamConfig,
    quant_config: QuantConfig,
    accelerator: Accelerator,
    *,
    codes: Mapping[str, Histogram] | None = None,
    prompts: int = 1,
    grid_bits: int | None = None,
    constants: Constants = CONSTANTS,
) -> Study:
    """Counts, estimates and compares.

    Args:
        model: its name, for titles.
        sam_config: the model.
        quant_config: its quantization.
        accelerator: the board.
        codes: measured histograms.
        prompts: boxes per image.
        grid_bits: width of the levels on the grid; 0 puts the paper's own form first and the grid beside it; None
            takes what the quantization has.
        constants: as in `hwcost.board.constants.with_values`.

    Raises:
        InputError: if the histograms belong to another model, method or width.
    """
    table = variants(sam_config, quant_config, codes, prompts=prompts, grid_bits=grid_bits)
    bits = (quant_config.w_bits, quant_config.a_bits)
    level_bits = table[METHOD].counts.grid_bits
    grid = f" ({level_bits}-bit grid)" if level_bits else ""
    return Study(
        title=f"{model} W{bits[0]}A{bits[1]}{grid} on {accelerator.name}",
        is_claimed=model == "vit_l" and bits == (4, 4),
        accelerator=accelerator,
        constants=constants,
        comparison=compare(table, accelerator, constants),
        sensitivities={form: all_sensitivities(table, accelerator, constants, form) for form in forms(table)},
        entries=ledger(table, accelerator, constants),
    )


def kernel_rows(study: Study) -> list[dict[str, Any]]:
    """What each kernel of the method takes, and how much faster it is than in FP32 and in the method's other form."""
    estimates = study.comparison.estimates
    over = ("fp32", *study.forms[1:])
    rows = []
    for kernel, *others in zip(*(estimates[name].kernels for name in (METHOD, *over)), strict=True):
        seconds = float(kernel.seconds[:, 0].max())
        rows.append(
            {
                "kernel": kernel.name,
                "part": kernel.part,
                "macs": kernel.macs,
                "seconds": seconds,
                "bound": kernel.bound,
                "seconds_by_resource": dict(zip(RESOURCES, kernel.seconds[:, 0].tolist(), strict=True)),
                "dram_bytes": float(kernel.dram_bytes[0]),
                **{
                    f"speedup_over_{name}": float(other.seconds[:, 0].max()) / seconds
                    for name, other in zip(over, others, strict=True)
                },
            }
        )
    return rows
