"""The made-up model has every site and layer of a real one; the command's table and its refusal."""

import subprocess
import sys

import jax
import numpy as np

import ahcptq_jax
from ahcptq_jax import W4A4
from ahcptq_jax.recipe import site_kind
from experiments.bench.made_up import random_quantized
from experiments.footprint import COLUMNS, table


def test_a_made_up_model_is_one_that_files_take(sam_tiny, tmp_path):
    config, params = sam_tiny
    made = random_quantized(config, params)
    assert {p.removesuffix("/input") for p in made.activations} >= set(made.weights) > set()
    kinds = {type(quantizer).__name__.lower() for quantizer in made.activations.values()}
    assert kinds == {site_kind(site, W4A4, "sam_vit") for site in made.activations}
    made.save(tmp_path / "made.safetensors")
    loaded = ahcptq_jax.load(tmp_path / "made.safetensors", config)
    jax.tree.map(np.testing.assert_array_equal, made, loaded)


def test_the_table_is_in_mebibytes():
    row = {column: (index + 1) * 2.0**20 for index, column in enumerate(COLUMNS)} | {"seconds": 7.4}
    assert table({"mini float": row}).splitlines()[-1] == "| mini float | 1 | 2 | 3 | 4 | 7 |"


def test_an_unknown_model_is_refused():
    words = [sys.executable, "-m", "experiments.footprint", "--models=vit_x"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "vit_x" in done.stderr and "Traceback" not in done.stderr
