"""The sweep names settings, repeats nothing that is done, and averages seeds."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ahcptq_jax.calibration.cache import StatisticsCache
from experiments import sweep
from experiments.job import records
from experiments.job.options import Options
from experiments.job.sweep_figure import draw

ROOT = Path(__file__).parents[2]


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
        ("ahcptq-gelu", "44", "switch with"),
        ("ahcptq-groups=4", "44", "switch with"),
        ("ahcptq+groups", "44", "switch with"),
        ("ahcptq+groups=many", "44", "groups is a number"),
        ("ahcptq+scale_rate=1e-x", "44", "scale_rate is a number"),
        ("ahcptq", "4", "two digits"),
        ("ahcptq", "4x", "two digits"),
    ],
)
def test_bad_settings_are_refused(methods: str, bits: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep.parse_settings(methods, bits)


def test_a_method_may_be_changed() -> None:
    (setting,) = sweep.parse_settings(
        "ahcptq-big-weight_search+hluq_fine+groups=8+group_metric=paper+act_range=mse+iterations=50+harder=1.5", "44"
    )
    options = setting.options(Options(iterations=7), seed=0, out=Path("x"))
    config = options.quant_config()
    assert (config.big, config.hluq_fine, config.groups, config.group_metric) == (False, True, 8, "paper")
    assert (config.weight_search, config.act_range) == (False, "mse")
    assert options.iterations == 50 and options.harder == 1.5
    assert options.model_name() == "MINI, harder by 1.5"


def test_exponents_keep_their_sign() -> None:
    (setting,) = sweep.parse_settings("ahcptq-big+scale_rate=1e-3+rounding_rate=2e+1-cag", "44")
    assert dict(setting.changes) == {"big": False, "scale_rate": 1e-3, "rounding_rate": 20.0, "cag": False}


def test_a_setting_given_twice_is_run_once() -> None:
    assert [s.name for s in sweep.parse_settings("ahcptq,minmax,ahcptq", "44,44")] == ["ahcptq_w4a4", "minmax_w4a4"]


@pytest.mark.parametrize(
    ("methods", "bits", "message"),
    [
        ("minmax,minmax+group_metric=none", "44", "ask for minmax.group_metric=none_w4a4: --group_metric"),
        ("minmax,minmax+granularity=none", "44", "--granularity='none' is unknown"),
        ("minmax,minmax+harder=9", "44", "--harder=9.0 must be"),
        ("minmax", "44,99", "ask for minmax_w9a9"),
    ],
)
def test_nothing_runs_if_one_setting_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: str, bits: str, message: str
) -> None:
    monkeypatch.setattr(sweep.one_run, "run", lambda *_, **__: pytest.fail("a run was started"))
    with pytest.raises(ValueError, match=message):
        sweep.sweep(Options(), sweep.parse_settings(methods, bits), 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unwritable_records_are_found_before_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep.one_run, "run", lambda *_, **__: pytest.fail("a run was started"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--records=.*cannot be written"):
        settings = sweep.parse_settings("minmax", "44")
        sweep.sweep(Options(), settings, 1, tmp_path / "out", tmp_path / "file" / "records.jsonl")


def test_a_run_without_ap_is_shown() -> None:
    nothing: dict[str, Any] = {"AP": None, "agreement_mIoU": None, "model": "MINI"}
    rows = {"floating point:MINI": [nothing], "a_w4a4": [nothing, nothing]}
    settings = [sweep.Setting("a", "x", (), 4, 4)]
    assert sweep.table_by_bits(settings, rows).splitlines()[2:] == [
        "| MINI | floating point | – | – |",
        "| MINI | a | – | – |",
    ]
    assert Image.open(io.BytesIO(draw(rows))).format == "PNG"


def test_finished_runs_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    def run(
        options: Options, journal: Path, cache: StatisticsCache, with_report: bool, verbosity: int
    ) -> dict[str, Any]:
        calls.append((options.method, options.seed))
        assert not with_report
        metrics = dict.fromkeys(sweep.COLUMNS[:7], 50.0 + options.seed) | {"APl": None, "APs": 0.86, "mIoU": 0.5}
        return {"fp": metrics, "quantized": metrics, "agreement_mIoU": 0.9, "model": options.model_name(), "units": []}

    monkeypatch.setattr(sweep.one_run, "run", run)
    settings = sweep.parse_settings("ahcptq,minmax", "44")
    first = sweep.sweep(Options(), settings, 2, tmp_path)
    assert calls == [("ahcptq", 0), ("minmax", 0), ("ahcptq", 1), ("minmax", 1)], "a seed's calibration is shared"
    again = sweep.sweep(Options(), settings, 2, tmp_path)
    assert len(calls) == 4 and again == first
    elsewhere = sweep.sweep(Options(), settings, 2, tmp_path / "b", records_file=tmp_path / "records.jsonl")
    assert len(calls) == 4 and elsewhere == first, "the folder is no part of a run"
    sweep.sweep(Options(limit=3), settings[:1], 1, tmp_path)
    assert len(calls) == 5, "other options are another run"
    assert "| MINI | ahcptq_w4a4 | 50.5 ± 0.7 |" in first and "| – |" in first
    assert "| 0.9 ± 0.0 |" in first and "| 0.500 ± 0.000 |" in first, "an AP below 1 is a percentage still"
    assert (tmp_path / "b" / "table.csv").read_text().count("\n") == 6
    assert Image.open(tmp_path / "table.png").size[0] > 500
    assert "units" not in (tmp_path / "records.jsonl").read_text()


def test_every_model_has_its_floating_point_row() -> None:
    def of(ap: float, model: str) -> list[dict[str, Any]]:
        return [{"AP": ap, "model": model}]

    rows = {
        "floating point:MINI": of(75, "MINI"),
        "a": of(70, "MINI"),
        "floating point:other": of(74, "other"),
        "a+harder=1": of(60, "other"),
    }
    lines = sweep.table(rows).splitlines()[2:]
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| MINI", "floating point", "75.0"],
        ["| MINI", "a", "70.0"],
        ["| other", "floating point", "74.0"],
        ["| other", "a+harder=1", "60.0"],
    ]
    assert Image.open(io.BytesIO(draw(rows))).format == "PNG"


def test_a_second_table_has_a_column_for_each_width() -> None:
    def of(ap: float) -> dict[str, Any]:
        return {"AP": ap, "agreement_mIoU": ap / 100, "model": "MINI"}

    rows = {"floating point:MINI": [of(75)], "a_w4a4": [of(70), of(72)], "b_w4a4": [of(50)], "a_w6a6": [of(74)]}
    settings = [sweep.Setting(text, "x", (), bits, bits) for bits in (4, 6) for text in ("a", "b", "c")]
    assert sweep.table_by_bits(settings, rows).splitlines()[2:] == [
        "| MINI | floating point | 75.0 | – | 75.0 | – |",
        "| MINI | a | 71.0 ± 1.4 | 0.710 ± 0.014 | 74.0 | 0.740 |",
        "| MINI | b | 50.0 | 0.500 | – | – |",
    ]


PHOTOGRAPHS = {
    "images": "coco100/val2017",
    "annotations": "coco100/annotations/instances_val2017.json",
    "calib_images": "coco100/train2017",
    "calib_annotations": "coco100/annotations/instances_train2017.json",
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mini_scenes", {"num_scenes": 200}),
        ("mini_scenes_harder", {"num_scenes": 200, "harder": 1.0}),
        ("mini_scenes_photographs", PHOTOGRAPHS),
    ],
)
def test_kept_records_are_the_tables_that_are_shown(
    name: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of `results/README.md` print its tables from `results/` without a run."""
    monkeypatch.setattr(sweep.one_run, "run", lambda options, **_: pytest.fail(f"no record of {options}"))
    methods = "ahcptq,ptq4sam_l,qdrop,brecq,adaround,ptq4sam_s,percentile,omse,minmax"
    settings = sweep.parse_settings(methods, "44,55,66")
    options = Options(checkpoint="mini-scenes", grid_bits=0, iterations=200, blank=False, **changes)
    printed = sweep.sweep(options, settings, 3, tmp_path, ROOT / "results" / f"{name}.jsonl")
    # They were made before records kept the version of their code, which is said and not silent.
    stale, _, by_bits = printed.split("\n\n")
    assert stale.startswith("protocol: box prompts, one mask a prompt, ranked by box score times predicted IoU (--")
    assert stale.splitlines()[1].startswith("rows of other code: 81 of 81 (made by an earlier version; this is ")
    assert by_bits.count("\n") == 12 and by_bits.strip() in (ROOT / "results" / "README.md").read_text()


@pytest.mark.parametrize("line", ["{", '{"config": {}}', '{"config": {"nothing": 1}, "fp": {}, "quantized": {}}', "[]"])
def test_damaged_records_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "records.jsonl"
    records.add(path, Options(), {"fp": {}, "quantized": {}})
    assert list(records.read(path)) == [Options()]
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match="no record of a run in line 2; delete the line"):
        records.read(path)
