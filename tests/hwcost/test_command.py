"""The command: what it prints and writes, whose flag files it takes, and what it says to unusable input."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from absl import flags
from PIL import Image

from ahcptq_jax import W4A4, QuantConfig
from hwcost import __main__ as command
from hwcost.board.accelerator import PRESETS
from hwcost.counts.codes import Histogram, to_json
from hwcost.pages import page, tables
from hwcost.study.options import Options, with_foreign_flags
from hwcost.study.study import Study, kernel_rows, study_of
from hwcost.study.variants import BASELINES, METHOD, TWO_PATH, variants
from sam_flax.config import MINI_SCENES as MINI
from sam_flax.errors import InputError

ROOT = Path(__file__).parents[2]


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hwcost", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("hwcost")
    ran = run(
        "--model=mini-scenes",
        "--flagfile=w4a4.flags",
        "--groups=2",
        "--device=zcu102",
        f"--report={out}",
        f"--json={out}/cost.json",
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return out, ran.stdout


@pytest.fixture(scope="module")
def mini() -> Study:
    return study_of("mini", MINI, W4A4, PRESETS["zcu102"])


def test_it_prints_and_writes_everything(done: tuple[Path, str]) -> None:
    out, printed = done
    assert {path.name for path in out.iterdir()} == {"cost.json", "layers.csv", "report.html"}
    for text in ("FP32", "INT8", "without HLUQ", "without CAG", "7.89x and 8.64x", "7.12x and 6.62x", "Not modelled"):
        assert text in printed
    for text in ("on a grid of 8-bit levels", "on a grid of 6-bit levels", "in the paper's form, two-path elements"):
        assert text in printed
    for base in ("FP32", "INT8 uniform", "W4A4 uniform", "the paper's form"):
        assert f"8-bit grid over {base}" in printed
    assert "paper's form over FP32" in printed and "What the grid gains" in printed


def test_json_holds_the_schema(done: tuple[Path, str]) -> None:
    document = json.loads((done[0] / "cost.json").read_text())
    assert {"totals", "layers", "speedup", "energy_ratio", "assumptions", "ledger"} <= document.keys()
    totals = document["totals"]
    for name in ("macs", "int_macs", "weight_bytes", "activation_bytes"):
        assert totals[name] == sum(layer[name] for layer in document["layers"]) > 0
    for ratio in ("speedup", "energy_ratio"):
        assert set(document[ratio]) == {*BASELINES, TWO_PATH}
        assert set(document["other_form"][ratio]) == set(BASELINES)
        for interval in (*document[ratio].values(), *document["other_form"][ratio].values()):
            assert 0 < interval["low"] < interval["high"] and interval["value"] > 0
    for record in document["assumptions"]["constants"]:
        assert record["source"] and record["status"] and record["unit"]
    assert document["assumptions"]["quant_config"]["groups"] == 2, "a flag after the file"
    assert document["ledger"]["is_this_model"] is False
    assert len(document["ledger"]["entries"]) == 2
    assert (
        list(document["forms"]) == [METHOD, TWO_PATH] == list(dict.fromkeys(r["form"] for r in document["sensitivity"]))
    )
    assert document["assumptions"]["grid_bits"] == 8 and document["totals"]["shifts"] == 0
    assert document["variants"][TWO_PATH]["totals"]["shifts"] > 0
    seconds = {row["kernel"]: row["seconds"] for row in document["kernels"]}
    assert sum(row["seconds"] for row in document["kernels"]) == pytest.approx(document["seconds"][METHOD]["value"])
    assert all(value > 0 for value in seconds.values())


def test_csv_has_a_row_for_every_layer(done: tuple[Path, str], mini: Study) -> None:
    rows = list(csv.DictReader((done[0] / "layers.csv").read_text().splitlines()))
    assert [row["path"] for row in rows] == [layer.path for layer in mini.counts.layers]
    assert sum(int(row["macs"]) for row in rows) == mini.counts.ops.macs
    assert {float(row["kernel_seconds"]) > 0 for row in rows} == {True}


def test_page_is_one_self_contained_file_with_whole_charts(done: tuple[Path, str]) -> None:
    text = (done[0] / "report.html").read_text()
    assert not re.search(r'(src|href)="|url\(|@import|<script', text)
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) == 6, "kernels, roofline, energy, two sensitivities, ledger"
    for chart in charts:
        root = ElementTree.fromstring(chart)
        width, height = (float(v) for v in root.attrib["viewBox"].split()[2:])
        for element in root.iter():
            assert "nan" not in " ".join(element.attrib.values()).lower()
            for name, limit in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                assert -1 <= float(element.attrib.get(name, 0)) <= limit + 1, element.attrib
    for word in ("Claim ledger", "Roofline", "Not modelled", "CAG", "HLUQ"):
        assert word in text


def test_bars_are_as_many_and_as_high_as_the_kernels(mini: Study) -> None:
    chart = ElementTree.fromstring(page._kernel_bars(mini).split("</svg>")[0] + "</svg>")
    bars = [element for element in chart.iter() if element.tag == "rect"]
    rows = kernel_rows(mini)
    assert len(bars) == len(rows)
    tallest = max(range(len(rows)), key=lambda i: rows[i]["seconds"])
    assert float(bars[tallest].attrib["height"]) == max(float(bar.attrib["height"]) for bar in bars)


def test_the_papers_form_comes_first_where_it_is_asked_for() -> None:
    paper, grid = (study_of("mini", MINI, W4A4, PRESETS["zcu102"], grid_bits=bits) for bits in (0, 8))
    assert (paper.title, grid.title) == ("mini W4A4 on ZCU102", "mini W4A4 (8-bit grid) on ZCU102")
    assert paper.counts == grid.paper_counts and paper.forms == (METHOD, "grid_8")
    for shown in (paper, grid):
        text = tables.text(shown)
        assert "8-bit grid over FP32" in text and "paper's form over FP32" in text
        assert {len(row) for row in tables.sensitivity_rows(shown)} == {len(tables.sensitivity_head(shown))}
    plain = study_of("mini", MINI, QuantConfig(hluq=False, cag=False, agq=False), PRESETS["zcu102"], grid_bits=8)
    assert "grid" not in tables.text(plain) and "grid" not in plain.title
    page.html(plain)


def test_switches_change_what_is_counted() -> None:
    options = Options(w_bits=6, a_bits=5, groups=8, agq=False, side=16, constant=("clock_mhz=250",))
    config, clock = options.quant_config(), options.constants()["clock_mhz"]
    assert (config.w_bits, config.a_bits, config.groups, config.agq, config.hluq) == (6, 5, 8, False, True)
    assert clock.value == clock.low == clock.high == 250 and options.accelerator().side == 16
    table = variants(MINI, config)
    assert table[METHOD].label.startswith("W6A5") and table[METHOD].design.bits == 6
    assert not Options(method="minmax").quant_config().hluq


def test_measured_histograms_replace_the_assumption(tmp_path: Path) -> None:
    site = "image_encoder/blocks_0/mlp/lin2/input"
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"code_histograms": to_json({site: Histogram(counts=(1,) * 16, log_levels=4)})}))
    name, config, quant_config, codes = command.inputs(Options(model="mini", results=str(results)))
    table = variants(config, quant_config, codes)
    assert (name, table[METHOD].counts.measured_sites, table["fp32"].counts.measured_sites) == ("mini", 1, 0)
    with pytest.raises(ValueError, match="belongs to no"):
        study_of("mini", MINI, QuantConfig(hluq=False), PRESETS["zcu102"], codes=codes)
    with pytest.raises(ValueError, match="not 2\\^5"):
        study_of("mini", MINI, QuantConfig(w_bits=5, a_bits=5), PRESETS["zcu102"], codes=codes)


def test_flags_of_the_main_job_are_taken_from_a_file_alone(tmp_path: Path) -> None:
    flagfile = tmp_path / "some.flags"
    flagfile.write_text("# a comment\n--w_bits=4\n--checkpoint=mini\n--noblank\n--boxes=gt\n")
    with pytest.MonkeyPatch.context() as patch:
        values = flags.FlagValues()
        flags.DEFINE_integer("w_bits", 4, "", flag_values=values)
        patch.setattr("hwcost.study.options.flags.FLAGS", values)
        expanded = with_foreign_flags(["hwcost", f"--flagfile={flagfile}", "--w_bits=5"])
        assert expanded[-1] == "--undefok=boxes,checkpoint,noblank"
        assert with_foreign_flags(["hwcost", "--w_bits=5"]) == ["hwcost", "--w_bits=5"]
    typo = run("--model=mini", "--w_bit=5", f"--report={tmp_path}")
    assert typo.returncode != 0 and "w_bit" in typo.stderr


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model": "vit_x"}, "--model='vit_x' is unknown"),
        ({"device": "vu19p"}, "--device='vu19p' is unknown"),
        ({"method": "fp"}, "--method='fp' is unknown"),
        ({"w_bits": 9}, "w_bits=9"),
        ({"prompts": 0}, "--prompts=0"),
        ({"side": 0}, "side=0"),
        ({"grid_bits": 4}, "--grid_bits=4 must be 0 or one of 5, 6, 7, 8"),
        ({"constant": ("speed=1",)}, "no constant 'speed'"),
        ({"constant": ("clock_mhz",)}, "NAME=NUMBER"),
        ({"constant": ("usable_lut=1.5",)}, "at most 1.0"),
        ({"artefact": "x"}, "needs --images"),
        ({"artefact": "x", "images": "y", "results": "z"}, "leave one of them out"),
    ],
)
def test_unusable_options_get_one_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        Options(**values)


def test_unusable_files_leave_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = run(f"--flagfile={tmp_path / 'absent.flags'}")
    assert ran.returncode == 2 and ran.stderr.startswith("Error: The flag file"), ran.stderr
    ran = run("--model=mini", f"--results={tmp_path / 'absent.json'}", f"--report={out}")
    assert ran.returncode == 2 and ran.stderr.startswith("Error: ") and "absent.json" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1 and not out.exists()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        command.inputs(Options(artefact=str(tmp_path / "absent.safetensors"), images=str(tmp_path)))


def test_photographs_come_in_order_and_few(tmp_path: Path) -> None:
    for i in range(10):
        Image.fromarray(np.full((4, 6, 3), i, np.uint8)).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "notes.txt").write_text("no photograph")
    images = command._photographs(str(tmp_path))
    assert [int(image[0, 0, 0]) for image in images] == list(range(8)) and images[0].shape == (4, 6, 3)
    with pytest.raises(InputError, match="has no .jpg or .png"):
        command._photographs(str(tmp_path / "absent"))
