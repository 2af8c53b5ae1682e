"""Everything that one run of the command works out."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ahcptq_jax.config import QuantConfig
from hwcost.board.accelerator import Accelerator
from hwcost.board.constants import CONSTANTS, Constants
from hwcost.board.estimate import RESOURCES
from hwcost.counts.codes import Histogram
from hwcost.counts.counts import Counts, count
from hwcost.study.compare import (
    METHOD,
    Comparison,
    Sensitivity,
    Variant,
    code_sensitivities,
    compare,
    sensitivities,
    variants,
)
from hwcost.study.ledger import Entry, ledger
from sam_flax.config import SamConfig

# What the papers speak of; other models are set beside their claims and the pages say so.
CLAIMED = "SAM-L at W4A4"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """One model at one quantization on one board.

    Attributes:
        title: "vit_l W4A4 on ZCU102".
        is_claimed: whether the papers' figures are about this model and these bits.
        accelerator: the board.
        constants: what it was run with.
        comparison: all variants.
        constant_rows: sensitivities of the constants, the largest first.
        code_rows: those of the assumed shares of codes.
        entries: the claim ledger.
    """

    title: str
    is_claimed: bool
    accelerator: Accelerator
    constants: Constants
    comparison: Comparison
    constant_rows: list[Sensitivity]
    code_rows: list[Sensitivity]
    entries: list[Entry]

    @property
    def counts(self) -> Counts:
        """Of the method."""
        return self.comparison.variants[METHOD].counts

    @property
    def variants(self) -> dict[str, Variant]:
        return self.comparison.variants


def study_of(
    model: str,
    sam_config: SamConfig,
    quant_config: QuantConfig,
    accelerator: Accelerator,
    *,
    codes: Mapping[str, Histogram] | None = None,
    prompts: int = 1,
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
        constants: as in `hwcost.board.constants.with_values`.

    Raises:
        InputError: if the histograms belong to another model, method or width.
    """
    count(sam_config, quant_config, codes, prompts=prompts)  # raises where histograms are another model's
    table = variants(sam_config, quant_config, codes, prompts=prompts)
    bits = (quant_config.w_bits, quant_config.a_bits)
    return Study(
        title=f"{model} W{bits[0]}A{bits[1]} on {accelerator.name}",
        is_claimed=model == "vit_l" and bits == (4, 4),
        accelerator=accelerator,
        constants=constants,
        comparison=compare(table, accelerator, constants),
        constant_rows=sensitivities(table, accelerator, constants),
        code_rows=code_sensitivities(table, accelerator, constants),
        entries=ledger(table, accelerator, constants),
    )


def kernel_rows(study: Study) -> list[dict[str, Any]]:
    """What each kernel of the method takes, and how much faster it is than in FP32."""
    fp32, method = study.comparison.estimates["fp32"], study.comparison.estimates[METHOD]
    rows = []
    for base, kernel in zip(fp32.kernels, method.kernels, strict=True):
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
                "speedup_over_fp32": float(base.seconds[:, 0].max()) / seconds,
            }
        )
    return rows
