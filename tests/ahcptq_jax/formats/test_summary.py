"""The summary: every layer once, and every byte of the file."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from ahcptq_jax.architectures.sam_vit import SAM_VIT, SamVit
from ahcptq_jax.formats.summary import Row, Summary, _by_number
from ahcptq_jax.quantizers import Grouped, Hybrid, Log2


@pytest.mark.parametrize("factor", [1.0, 1.0001])
def test_the_total_is_the_files_size(tiny_quantized, factor, tmp_path):
    """With a remainder that float16 holds and with one that it does not."""
    model = dataclasses.replace(tiny_quantized, params=jax.tree.map(lambda a: a * factor, tiny_quantized.params))
    model.save(tmp_path / "f")
    summary = model.summary()
    assert summary.nbytes == (tmp_path / "f").stat().st_size
    widths = {row.w_bits for row in summary.rows if row.name.endswith("(float)")}
    assert widths == ({16} if factor == 1.0 else {32})


def test_rows_say_what_the_model_holds(tiny_quantized):
    rows = {row.name: row for row in tiny_quantized.summary().rows}
    for path, weight in tiny_quantized.weights.items():
        row = rows[path]
        assert row.w_bits == weight.bits and row.shape == weight.shape and row.nbytes > weight.packed.nbytes
    for site, quantizer in tiny_quantized.activations.items():
        row = rows[site.removesuffix("/input")]
        assert row.a_bits == quantizer.bits
        assert row.groups == (len(quantizer.scale) if isinstance(quantizer, Grouped) else 0)
        if isinstance(quantizer, Hybrid):
            for part in ("log_levels", "scale_log", "scale_uniform"):
                assert f"{float(getattr(quantizer, part)):.3g}" in row.detail
        if isinstance(quantizer, Log2):
            assert row.detail == f"tau {int(quantizer.tau)}"
    floats = [row for row in rows.values() if row.name.endswith("(float)")]
    left = sum(
        np.size(a) for name in ("iou_token", "mask_tokens") for a in [tiny_quantized.params["mask_decoder"][name]]
    )
    assert all(row.w_bits == 16 and row.a_bits is None for row in floats)
    assert sum(row.nbytes for row in floats if "token" in row.name) == 2 * left


def test_the_table_has_a_line_for_each_row_and_the_total(tiny_quantized):
    summary = tiny_quantized.summary()
    *lines, total, share = str(summary).splitlines()
    # The bytes of the rows, in their order, are the last words of the lines that end with a number.
    ends = [line.split()[-1] for line in lines if re.search(r" [\d,]+$", line) and not line.startswith("    ")]
    assert ends == [f"{row.nbytes:,}" for row in summary.rows]
    assert total.startswith("total") and total.endswith(f"{summary.nbytes:,}")
    assert share.startswith(f"{summary.nbytes / summary.float32_nbytes:.3f} of float32")
    weights = sum(np.prod(w.shape) for w in tiny_quantized.weights.values())
    assert summary.float32_nbytes == tiny_quantized.nbytes()["fp32"] > 4 * weights


def test_the_table_fits_a_terminal_of_100_columns():
    """With the longest names and largest numbers of SAM-H, which SAM 2's names do not pass."""
    detail = "14 of 256 codes log up to 123.456 above -0.1699, then steps of 0.0024909, as a new kind may say"
    names = {
        "image_encoder/blocks_31/mlp/lin2": (5120, 1280),
        "image_encoder/neck/conv2": (3, 3, 256, 256),
        "mask_decoder/transformer/layers_1/cross_attn_token_to_image/q_proj": (256, 128),
        "mask_decoder/transformer/final_attn_token_to_image/softmax": (),
        "mask_decoder/output_hypernetworks_mlps_3 (float)": (),
        "header (names, recipe, checksums)": (),
    }
    rows = [Row(name, shape, 8, 8, "grouped", 1280, detail, 1_234_567_890) for name, shape in names.items()]
    sites = tuple(f"image_encoder/blocks_{i}/attn/softmax" for i in range(9))
    text = str(Summary(tuple(rows), 2_564_373_504, sites))
    assert max(map(len, text.splitlines())) <= 100
    assert "\nimage_encoder/blocks_31\n  mlp/lin2 " in text
    assert "\nmask_decoder/transformer/layers_1\n  cross_attn_token_to_image/q_proj " in text


def test_blocks_are_in_the_order_of_their_numbers():
    names = ["blocks_9/attn", "blocks_10/attn", "blocks_2/mlp", "blocks_2/attn/q", "blocks_2/attn"]
    assert sorted(names, key=_by_number) == [*names[:1:-1], *names[:2]]


def test_sites_that_no_rule_names_are_listed(tiny_quantized, monkeypatch):
    assert tiny_quantized.summary().unnamed == () and "No rule" not in str(tiny_quantized.summary())
    rules = tuple(rule for rule in SAM_VIT.rules if not rule.pattern.endswith("conv[12]/input"))
    monkeypatch.setattr(SamVit, "rules", rules)
    summary = tiny_quantized.summary()
    assert sorted(summary.unnamed) == ["image_encoder/neck/conv1/input", "image_encoder/neck/conv2/input"]
    assert all(site in str(summary).rpartition("No rule names")[2] for site in summary.unnamed)
