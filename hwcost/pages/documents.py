"""The study as JSON and CSV."""

import csv
import io
import json
from dataclasses import asdict
from typing import Any

from hwcost.board.constants import yosys_cells
from hwcost.board.estimate import Estimate
from hwcost.counts.costs import Layer
from hwcost.study.compare import Interval
from hwcost.study.study import CLAIMED, Study, kernel_rows
from hwcost.study.variants import METHOD, Variant, baselines


def json_text(study: Study) -> str:
    """The JSON form as text; not-a-number is refused."""
    return json.dumps(document(study), indent=1, allow_nan=False) + "\n"


def document(study: Study) -> dict[str, Any]:
    """The JSON form. Times in seconds, energies in joules, sizes in bytes; an interval is 5 to 95 % of the draws."""
    c, counts = study.comparison, study.counts
    return {
        "title": study.title,
        "forms": {name: study.variants[name].label for name in study.forms},
        "totals": counts.totals(),
        "totals_by_part": {part: counts.totals(part) for part in ("encoder", "decoder")},
        "layers": [_layer(layer) for layer in counts.layers],
        "kernels": kernel_rows(study),
        "seconds": {name: asdict(Interval.of(e.seconds)) for name, e in c.estimates.items()},
        "joules": {name: asdict(Interval.of(e.total_joules)) for name, e in c.estimates.items()},
        "joules_by_kind": {
            name: {kind: float(value[0]) for kind, value in e.joules.items()} for name, e in c.estimates.items()
        },
        **_ratios(study, METHOD),
        "other_form": _ratios(study, study.forms[1]) if len(study.forms) > 1 else None,
        "variants": {name: _variant(variant, c.estimates[name]) for name, variant in study.variants.items()},
        "assumptions": {
            "accelerator": asdict(study.accelerator),
            "constants": [
                {k: v for k, v in asdict(record).items() if k != "most"} for record in study.constants.values()
            ],
            "element_areas": yosys_cells(),
            "codes": {
                "measured_sites": study.paper_counts.measured_sites,
                "assumed_sites": study.paper_counts.assumed_sites,
                "assumed": asdict(counts.assumed),
            },
            "prompts": counts.prompts,
            "grid_bits": counts.grid_bits,
            "quant_config": asdict(counts.quant_config) if counts.quant_config else None,
            "unmodelled": list(counts.unmodelled),
        },
        "sensitivity": [{"form": form, **asdict(row)} for form, rows in study.sensitivities.items() for row in rows],
        "ledger": {
            "about": CLAIMED,
            "is_this_model": study.is_claimed,
            "entries": [
                {
                    "claim": asdict(entry.claim),
                    "combinations": entry.combinations,
                    "reached": [asdict(a) for a in entry.reached],
                    "nearest": asdict(entry.nearest),
                    "verdict": entry.verdict,
                }
                for entry in study.entries
            ],
        },
    }


def _ratios(study: Study, form: str) -> dict[str, Any]:
    """Speed and energy of a form of the method over each baseline: as large as fits, and with FP32's elements."""
    c, names = study.comparison, [name for name in baselines(study.variants) if name != form]
    return {
        "speedup": {name: asdict(c.speedup(name, form)) for name in names},
        "energy_ratio": {name: asdict(c.energy_ratio(name, form)) for name in names},
        "speedup_iso_array": {name: asdict(c.speedup(name, form, iso_array=True)) for name in names},
        "energy_ratio_iso_array": {name: asdict(c.energy_ratio(name, form, iso_array=True)) for name in names},
    }


def _variant(variant: Variant, result: Estimate) -> dict[str, Any]:
    return {
        "label": variant.label,
        "design": asdict(variant.design),
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
        **asdict(layer.ops),
        "accumulators": layer.accumulators,
        "weight_bytes": layer.weight_bytes,
        "qparam_bytes": layer.qparam_bytes,
        "activation_bytes": layer.activation_bytes,
        "dram_activation_bytes": layer.dram_activation_bytes,
        "reuse": layer.reuse,
    }


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
