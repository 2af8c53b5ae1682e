"""What `pip install` gives: a command, and everything that it reads, in a wheel and from a source distribution."""

import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Files beside the code that a run reads.
DATA = ("ahcptq_jax/presets/w4a4.flags", "sam_flax/weights/mini.safetensors", "hwcost/rtl/", "hwcost/data/")


def test_the_command_is_the_main_job():
    module, function = PROJECT["scripts"]["ahcptq-jax"].split(":")
    code = f"import sys; sys.argv = ['ahcptq-jax', '--help']; from {module} import {function}; {function}()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "--w_bits" in done.stdout and "--num_calib" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_clean_environment_runs_the_main_job(kind, tmp_path):
    # Into a folder of its own: a build leaves files beside the code.
    checkout, dist = tmp_path / "checkout", tmp_path / "dist"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "build"], check=True)
    subprocess.run([python, "-m", "build", f"--{kind}", f"--outdir={dist}", str(checkout)], check=True)
    (built,) = dist.iterdir()
    if kind == "wheel":
        names = zipfile.ZipFile(built).namelist()
        for part in DATA:
            assert any(name.startswith(part) for name in names), part
        assert not any(name.startswith("tests/") for name in names)
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(built)], check=True)
    away = tmp_path / "away"
    away.mkdir()
    small = ["--checkpoint=mini-scenes", "--num_scenes=2", "--num_calib=2", "--iterations=2", "--out=out"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python.parent / "ahcptq-jax"), "--flagfile=w4a4.flags", *small]
    done = subprocess.run(command, cwd=away, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("report.html", "results.json", "quantized.safetensors"):
        assert (away / "out" / name).is_file()
