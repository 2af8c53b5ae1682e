"""The sweep names settings, repeats nothing that is done, and averages seeds."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from experiments import sweep
from experiments.options import Options


def test_settings_are_parsed() -> None:
    settings = sweep.parse_settings("ahcptq-hluq-cag,minmax", "44,86")
    assert [s.name for s in settings] == ["ahcptq-hluq-cag_w4a4", "minmax_w4a4", "ahcptq-hluq-cag_w8a6", "minmax_w8a6"]
    options = settings[2].options(Options(), seed=3, out=Path("x"))
    assert (options.w_bits, options.a_bits, options.seed) == (8, 6, 3)
    config = options.quant_config()
    assert not config.hluq and not config.cag and config.big and config.agq


@pytest.mark.parametrize(
    ("methods", "bits", "message"),
    [
        ("nothing", "44", "choose of"),
        ("ahcptq-gelu", "44", "switches off"),
        ("ahcptq", "4", "two digits"),
        ("ahcptq", "4x", "two digits"),
    ],
)
def test_bad_settings_are_refused(methods: str, bits: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep.parse_settings(methods, bits)


def test_finished_runs_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def run(options: Options, journal: Path | None = None) -> dict[str, Any]:
        calls.append(options.out)
        metrics = dict.fromkeys(sweep.COLUMNS[:7], 50.0 + options.seed) | {"APl": None, "APs": 0.86, "mIoU": 0.5}
        results = {"fp": metrics, "quantized": metrics, "agreement_mIoU": 0.9, "config": dataclasses.asdict(options)}
        Path(options.out).mkdir(parents=True, exist_ok=True)
        (Path(options.out) / "results.json").write_text(json.dumps(results))
        return results

    monkeypatch.setattr(sweep.main_job, "run", run)
    settings = sweep.parse_settings("ahcptq", "44")
    first = sweep.sweep(Options(), settings, 2, tmp_path)
    assert len(calls) == 2
    again = sweep.sweep(Options(), settings, 2, tmp_path)
    assert len(calls) == 2 and again == first
    sweep.sweep(Options(limit=3), settings, 1, tmp_path)
    assert len(calls) == 3, "other options are another run"
    assert "| ahcptq_w4a4 | 50.5 ± 0.7 |" in first and "| – |" in first
    assert "| 0.9 ± 0.0 |" in first and "| 0.500 ± 0.000 |" in first, "an AP below 1 is a percentage still"
    assert (tmp_path / "table.csv").read_text().count("\n") == 2


def test_damaged_results_are_named(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        sweep.finished(Options(out=str(tmp_path)))
