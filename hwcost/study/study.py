"""Everything that one run of the command works out, and its JSON and CSV forms."""

import csv
import dataclasses
import io
from collections.abc import Mapping
from typing import Any

from ahcptq_jax.config import QuantConfig
from hwcost.board.accelerator import Accelerator
from hwcost.board.constants import CONSTANTS, Constants, yosys_cells
from hwcost.board.estimate import RESOURCES, Estimate
from hwcost.counts.codes import Histogram
from hwcost.counts.costs import Layer
from hwcost.counts.counts import Counts, count
from hwcost.study.compare import (
    BASELINES,
    METHOD,
    Comparison,
    Interval,
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


def run(
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


# JSON


def document(study: Study) -> dict[str, Any]:
    """The JSON form. Times in seconds, energies in joules, sizes in bytes; an interval is 5 to 95 % of the draws."""
    c, counts = study.comparison, study.counts
    return {
        "title": study.title,
        "totals": counts.totals(),
        "totals_by_part": {part: counts.totals(part) for part in ("encoder", "decoder")},
        "layers": [_layer(layer) for layer in counts.layers],
        "kernels": kernel_rows(study),
        "seconds": {name: _interval(Interval.of(e.seconds)) for name, e in c.estimates.items()},
        "joules": {name: _interval(Interval.of(e.total_joules)) for name, e in c.estimates.items()},
        "joules_by_kind": {
            name: {kind: float(value[0]) for kind, value in e.joules.items()} for name, e in c.estimates.items()
        },
        "speedup": {name: _interval(c.speedup(name)) for name in BASELINES},
        "energy_ratio": {name: _interval(c.energy_ratio(name)) for name in BASELINES},
        "speedup_iso_array": {name: _interval(c.speedup(name, iso_array=True)) for name in BASELINES},
        "energy_ratio_iso_array": {name: _interval(c.energy_ratio(name, iso_array=True)) for name in BASELINES},
        "variants": {name: _variant(variant, c.estimates[name]) for name, variant in study.variants.items()},
        "assumptions": {
            "accelerator": dataclasses.asdict(study.accelerator),
            "constants": [
                {k: v for k, v in dataclasses.asdict(record).items() if k != "most"}
                for record in study.constants.values()
            ],
            "element_areas": yosys_cells(),
            "codes": {
                "measured_sites": counts.measured_sites,
                "assumed_sites": counts.assumed_sites,
                "assumed": dataclasses.asdict(counts.assumed),
            },
            "prompts": counts.prompts,
            "quant_config": dataclasses.asdict(counts.quant_config) if counts.quant_config else None,
            "unmodelled": list(counts.unmodelled),
        },
        "sensitivity": [_sensitivity(row) for row in (*study.constant_rows, *study.code_rows)],
        "ledger": {
            "about": CLAIMED,
            "is_this_model": study.is_claimed,
            "entries": [
                {
                    "claim": dataclasses.asdict(entry.claim),
                    "combinations": entry.combinations,
                    "reached": [dataclasses.asdict(a) for a in entry.reached],
                    "nearest": dataclasses.asdict(entry.nearest),
                    "verdict": entry.verdict,
                }
                for entry in study.entries
            ],
        },
    }


def _interval(interval: Interval) -> dict[str, float]:
    return dataclasses.asdict(interval)


def _sensitivity(row: Sensitivity) -> dict[str, Any]:
    return dataclasses.asdict(row)


def _variant(variant: Variant, result: Estimate) -> dict[str, Any]:
    return {
        "label": variant.label,
        "design": dataclasses.asdict(variant.design),
        "elements": float(result.elements[0]),
        "float_elements": float(result.float_elements[0]),
        "vector_lanes": float(result.lanes[0]),
        "totals": variant.counts.totals(),
    }


def _layer(layer: Layer) -> dict[str, Any]:
    gemm = layer.gemm
    return {
        "path": layer.path,
        "part": layer.part,
        "kernel": layer.kernel,
        "kind": layer.kind,
        "width": layer.width,
        "shape": [gemm.m, gemm.k, gemm.n, gemm.repeat] if gemm else None,
        **dataclasses.asdict(layer.ops),
        "accumulators": layer.accumulators,
        "weight_bytes": layer.weight_bytes,
        "qparam_bytes": layer.qparam_bytes,
        "activation_bytes": layer.activation_bytes,
        "dram_activation_bytes": layer.dram_activation_bytes,
        "reuse": layer.reuse,
    }


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


def layers_csv(study: Study) -> str:
    """One row for each layer, with its kernel's time and bound."""
    kernels = {(row["kernel"], row["part"]): row for row in kernel_rows(study)}
    out = io.StringIO()
    rows = []
    for layer in study.counts.layers:
        row = {k: v for k, v in _layer(layer).items() if k != "shape"}
        kernel = kernels[layer.kernel, layer.part]
        rows.append({**row, "kernel_seconds": kernel["seconds"], "kernel_bound": kernel["bound"]})
    writer = csv.DictWriter(out, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
