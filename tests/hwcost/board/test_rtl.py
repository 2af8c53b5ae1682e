"""The processing elements: simulated with Icarus Verilog against the integer sums, synthesized with Yosys."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ahcptq_jax.quantizers import Grouped, Hybrid, Log2, Quantizer, Uniform
from ahcptq_jax.quantizers.kinds import kind_of
from hwcost.board import synthesis
from hwcost.board.constants import yosys_cells
from hwcost.board.elements import agq_sums, column_sums, hluq_sums, level_sum, mac_sum
from hwcost.board.synthesis import (
    FIELD,
    RTL,
    agq_parameters,
    column_parameters,
    hluq_parameters,
    lane_parameters,
    level_parameters,
    mac_parameters,
    packing,
)

needs_iverilog = pytest.mark.skipif(
    shutil.which("iverilog") is None, reason="iverilog is not installed (Debian package iverilog)"
)
needs_yosys = pytest.mark.skipif(bool(synthesis.yosys_missing()), reason=synthesis.yosys_missing() or "-")

BENCH = """
module bench;
  {inputs}
  {outputs}
  reg clk = 0;
  reg [{width}-1:0] vectors [0:{last}];
  integer i;
  {wires}
  {top} #({parameters}) dut (.clk(clk), {ports});
  initial begin
    $readmemh("vectors.hex", vectors);
    for (i = 0; i <= {last}; i = i + 1) begin
      {{{names}}} = vectors[i];
      #1 clk = 1;
      #1 clk = 0;
      $display("{formats}", {results});
    end
  end
endmodule
"""

Ports = Sequence[tuple[str, int]]


def simulate(
    folder: Path,
    top: str,
    parameters: dict[str, int],
    inputs: Ports,
    outputs: Ports,
    vectors: dict[str, np.ndarray],
    *,
    wires: str = "",
    ports: str = "",
    skip: int = 0,
) -> list[np.ndarray]:
    """Clocks the module once for each vector; each output after all edges but the first `skip`, as Python integers."""
    ports = ports or ", ".join(f".{name}({name})" for name, _ in (*inputs, *outputs))
    width = sum(bits for _, bits in inputs)
    count = len(next(iter(vectors.values())))
    bench = BENCH.format(
        top=top, width=width, last=count - 1, wires=wires, ports=ports,
        parameters=", ".join(f".{k}({v})" for k, v in parameters.items()),
        inputs=" ".join(f"reg [{bits}-1:0] {name};" for name, bits in inputs),
        outputs=" ".join(f"wire [{bits}-1:0] {name};" for name, bits in outputs),
        names=", ".join(name for name, _ in inputs),
        formats=" ".join(["%h"] * len(outputs)),
        results=", ".join(name for name, _ in outputs),
    )  # fmt: skip
    (folder / "bench.v").write_text(bench)
    words = [0] * count
    for name, bits in inputs:
        words = [(word << bits) | int(value) for word, value in zip(words, vectors[name], strict=True)]
    (folder / "vectors.hex").write_text("\n".join(f"{word:x}" for word in words))
    sources = [str(path) for path in sorted(RTL.glob("*.v"))]
    built = subprocess.run(
        ["iverilog", "-g2001", "-Wall", "-s", "bench", "-o", "bench.vvp", "bench.v", *sources],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    ran = subprocess.run(["vvp", "bench.vvp"], cwd=folder, capture_output=True, text=True, check=True)
    rows = [line.split() for line in ran.stdout.splitlines()]
    assert len(rows) == count, ran.stdout[:500]
    return [np.array([int(row[i], 16) for row in rows[skip:]], object) for i in range(len(outputs))]


def running(clear: np.ndarray, valid: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """What an accumulator holds after every edge: it starts anew at `clear` and moves at `valid` alone."""
    value, held = 0, []
    for c, v, term in zip(clear, valid, terms, strict=True):
        if v:
            value = (0 if c else value) + int(term)
        held.append(value)
    return np.array(held, object)


def control(rng: np.random.Generator, count: int, every: int = 50) -> dict[str, np.ndarray]:
    """Random starts and pauses; the first step starts, since registers hold nothing known before."""
    clear, valid = (rng.random(count) < 1 / every).astype(int), (rng.random(count) < 0.8).astype(int)
    clear[0] = valid[0] = 1
    return {"clear": clear, "valid": valid}


def exhaustive(*sizes: int) -> list[np.ndarray]:
    """All combinations, each started anew."""
    return [axis.ravel() for axis in np.meshgrid(*(np.arange(size) for size in sizes), indexing="ij")]


CONTROL = (("clear", 1), ("valid", 1))


@needs_iverilog
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_mac(bits: int, tmp_path: Path) -> None:
    parameters = mac_parameters(bits)
    inputs, outputs = (*CONTROL, ("w", bits), ("a", bits)), (("acc", parameters["ACC_BITS"]),)
    w, a = exhaustive(2**bits, 2**bits)
    ones = np.ones(len(w), int)
    alone = simulate(
        tmp_path, "int_mac_pe", parameters, inputs, outputs, {"clear": ones, "valid": ones, "w": w, "a": a}
    )
    assert np.array_equal(alone[0], [mac_sum(x[None], y[None]) for x, y in zip(w, a, strict=True)])
    rng = np.random.default_rng(bits)
    flags, (w, a) = control(rng, 2000), rng.integers(0, 2**bits, (2, 2000))
    together = simulate(tmp_path, "int_mac_pe", parameters, inputs, outputs, {**flags, "w": w, "a": a})
    assert np.array_equal(together[0], running(*flags.values(), w * a))


@needs_iverilog
def test_mac_holds_the_longest_sum(tmp_path: Path) -> None:
    parameters, count = mac_parameters(4), 2**synthesis.SUM_LOG2
    inputs, outputs = (*CONTROL, ("w", 4), ("a", 4)), (("acc", parameters["ACC_BITS"]),)
    full, clear = np.full(count, 15), np.zeros(count, int)
    clear[0] = 1
    vectors = {"clear": clear, "valid": np.ones(count, int), "w": full, "a": full}
    result = simulate(tmp_path, "int_mac_pe", parameters, inputs, outputs, vectors)
    assert result[0][-1] == 225 * count


@needs_iverilog
@pytest.mark.parametrize("bits", [3, 4, 5])
def test_hluq(bits: int, tmp_path: Path) -> None:
    parameters = hluq_parameters(bits)
    shift = parameters["MAX_SHIFT"]
    inputs = (*CONTROL, ("levels", bits), ("w", bits), ("a", bits))
    outputs = (("acc_log", parameters["LOG_BITS"]), ("acc_uni", parameters["UNI_BITS"]))

    def terms(levels: np.ndarray, w: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log, uniform = zip(
            *(hluq_sums(x[None], y[None], int(n), shift) for n, x, y in zip(levels, w, a, strict=True)), strict=True
        )
        return np.array(log), np.array(uniform)

    levels, w, a = exhaustive(2**bits, 2**bits, 2**bits)
    ones = np.ones(len(w), int)
    vectors = {"clear": ones, "valid": ones, "levels": levels, "w": w, "a": a}
    alone = simulate(tmp_path, "hluq_pe", parameters, inputs, outputs, vectors)
    for got, expected in zip(alone, terms(levels, w, a), strict=True):
        assert np.array_equal(got, expected)
    rng = np.random.default_rng(bits)
    flags, (w, a) = control(rng, 2000), rng.integers(0, 2**bits, (2, 2000))
    levels = np.full(2000, 2 ** (bits - 2))
    vectors = {**flags, "levels": levels, "w": w, "a": a}
    together = simulate(tmp_path, "hluq_pe", parameters, inputs, outputs, vectors)
    for got, term in zip(together, terms(levels, w, a), strict=True):
        assert np.array_equal(got, running(*flags.values(), term))


@needs_iverilog
def test_hluq_in_one_multiplication(tmp_path: Path) -> None:
    """The decoded operand carries both paths; the two sums lie side by side in the 48 bits of a DSP."""
    decode = f"""wire [25:0] operand;
  hluq_decode #(.FIELD({FIELD})) decoder (.levels(levels), .a(a), .operand(operand));"""
    inputs = (*CONTROL, ("levels", 4), ("w", 4), ("a", 4))
    settings = {"folder": tmp_path, "top": "hluq_pe_dsp", "parameters": {}, "inputs": inputs}
    ports = ".clear(clear), .valid(valid), .w(w), .operand(operand), .acc(acc)"

    def run(vectors: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        acc = simulate(**settings, outputs=(("acc", 48),), vectors=vectors, wires=decode, ports=ports)[0]
        return np.array([x % 2**FIELD for x in acc], object), np.array([x >> FIELD for x in acc], object)

    levels, w, a = exhaustive(9, 16, 16)
    ones = np.ones(len(w), int)
    log, uniform = run({"clear": ones, "valid": ones, "levels": levels, "w": w, "a": a})
    expected = [hluq_sums(x[None], y[None], int(n), 7) for n, x, y in zip(levels, w, a, strict=True)]
    assert np.array_equal(log, [e[0] for e in expected]) and np.array_equal(uniform, [e[1] for e in expected])
    # The worst case of 2184 products still fits beside the other sum; the next may not.
    count = 2184
    clear = np.zeros(count, int)
    clear[0] = 1
    worst = {"levels": np.full(count, 4), "w": np.full(count, 15), "a": np.full(count, 15)}
    log, uniform = run({"clear": clear, "valid": np.ones(count, int), **worst})
    total = hluq_sums(worst["w"], worst["a"], 4, 7)
    assert (log[-1], uniform[-1]) == total and total[0] < 2**FIELD <= total[0] + 15 * 2**7


@needs_iverilog
@pytest.mark.parametrize("tau_log2", [0, 1, 2])
def test_agq(tau_log2: int, tmp_path: Path) -> None:
    parameters = agq_parameters(4, tau_log2)
    tau, shift, bits = 1 << tau_log2, parameters["MAX_SHIFT"], parameters["ACC_BITS"]
    inputs, outputs = (*CONTROL, ("v", 4), ("a", 4)), (("acc", bits * tau),)

    def run(vectors: dict[str, np.ndarray]) -> list[np.ndarray]:
        acc = simulate(tmp_path, "agq_pe", parameters, inputs, outputs, vectors)[0]
        return [np.array([(x >> (bits * r)) % 2**bits for x in acc], object) for r in range(tau)]

    def terms(v: np.ndarray, k: np.ndarray) -> np.ndarray:  # (tau, steps)
        return np.array([agq_sums(x[None], y[None], 4, tau, shift) for x, y in zip(v, k, strict=True)]).T

    v, k = exhaustive(16, 16)
    ones = np.ones(len(v), int)
    assert np.array_equal(run({"clear": ones, "valid": ones, "v": v, "a": k}), terms(v, k))
    rng = np.random.default_rng(tau)
    flags, (v, k) = control(rng, 2000), rng.integers(0, 16, (2, 2000))
    for got, term in zip(run({**flags, "v": v, "a": k}), terms(v, k), strict=True):
        assert np.array_equal(got, running(*flags.values(), term))


@needs_iverilog
@pytest.mark.parametrize("group_bits", [1, 2])
def test_cag_column(group_bits: int, tmp_path: Path) -> None:
    parameters, groups, rows = column_parameters(4, group_bits), 1 << group_bits, 4
    bits = parameters["ACC_BITS"]
    inputs = (*CONTROL, ("w", 4 * rows), ("a", 4 * rows), ("group", group_bits * rows))
    outputs = (("acc", bits * groups),)

    def packed(codes: np.ndarray, width: int) -> np.ndarray:  # (steps, rows) -> (steps,)
        return (codes << (width * np.arange(rows))).sum(1)

    def check(flags: dict[str, np.ndarray], w: np.ndarray, a: np.ndarray, g: np.ndarray) -> None:
        vectors = {**flags, "w": packed(w, 4), "a": packed(a, 4), "group": packed(g, group_bits)}
        acc = simulate(tmp_path, "cag_column", parameters, inputs, outputs, vectors)[0]
        expected = column_sums(w.T, a.T, g.T, groups)  # (groups, steps)
        for label in range(groups):
            got = np.array([(x >> (bits * label)) % 2**bits for x in acc], object)
            assert np.array_equal(got, running(*flags.values(), expected[label]))

    # Every code and label in every row, beside random neighbours.
    w, a, g, row = exhaustive(16, 16, groups, rows)
    rng = np.random.default_rng(groups)
    others = [rng.integers(0, size, (len(w), rows)) for size in (16, 16, groups)]
    for codes, own in zip(others, (w, a, g), strict=True):
        codes[np.arange(len(w)), row] = own
    ones = np.ones(len(w), int)
    check({"clear": ones, "valid": ones}, *others)
    flags = control(rng, 2000)
    check(flags, *(rng.integers(0, size, (2000, rows)) for size in (16, 16, groups)))


@needs_iverilog
@pytest.mark.parametrize("level_bits", [6, 7, 8])
def test_a_table_and_a_plain_element_multiply_by_levels(level_bits: int, tmp_path: Path) -> None:
    """Every weight, code and group, through a table that is written first, against the integer model."""
    parameters = level_parameters(4, level_bits)
    table = np.random.default_rng(level_bits).integers(0, 2**level_bits, (4, 16))
    table[0] = np.arange(16)  # a plain part: codes are levels
    wires = f"""wire [{level_bits}-1:0] a;
  level_table #(.A_BITS(4), .GROUP_BITS(2), .LEVEL_BITS({level_bits})) table_ (.clk(clk), .write(write),
      .write_address(write_address), .write_level(write_level), .address({{part, code}}), .level(a));"""
    inputs = (
        *CONTROL, ("write", 1), ("write_address", 6), ("write_level", level_bits), ("w", 4), ("part", 2), ("code", 4)
    )  # fmt: skip
    ports = ".clear(clear), .valid(valid), .w(w), .a(a), .acc(acc)"

    def run(flags: dict[str, np.ndarray], w: np.ndarray, part: np.ndarray, code: np.ndarray) -> np.ndarray:
        """The sums after the table is written, one entry a step."""
        idle = {name: np.concatenate([np.zeros(64, int), x]) for name, x in flags.items()}
        steps = {name: np.concatenate([np.zeros(64, int), x]) for name, x in (("w", w), ("part", part), ("code", code))}
        write = {
            "write": np.arange(64 + len(w)) < 64,
            "write_address": np.concatenate([np.arange(64), np.zeros_like(w)]),
            "write_level": np.concatenate([table.ravel(), np.zeros_like(w)]),
        }
        vectors = {**idle, **{name: x.astype(int) for name, x in write.items()}, **steps}
        outputs = (("acc", parameters["ACC_BITS"]),)
        return simulate(
            tmp_path, "int_mac_pe", parameters, inputs, outputs, vectors, wires=wires, ports=ports, skip=64
        )[0]  # fmt: skip

    w, part, code = exhaustive(16, 4, 16)
    ones = np.ones(len(w), int)
    alone = run({"clear": ones, "valid": ones}, w, part, code)
    triples = zip(w[:, None], code[:, None], part[:, None], strict=True)
    assert np.array_equal(alone, [level_sum(x, y, table, p) for x, y, p in triples])
    rng = np.random.default_rng(1)
    flags, (w, code), part = control(rng, 2000), rng.integers(0, 16, (2, 2000)), rng.integers(0, 4, 2000)
    assert np.array_equal(run(flags, w, part, code), running(*flags.values(), w * table[part, code]))


@needs_iverilog
@pytest.mark.parametrize("level_bits", [5, 6, 7, 8])
def test_products_that_share_a_dsp_do_not_touch(level_bits: int, tmp_path: Path) -> None:
    """Every weight and level in every lane, beside random neighbours; and the longest sum of the largest products."""
    parameters = lane_parameters(4, level_bits)
    columns, rows, bits = parameters["LANES"], parameters["ROWS"], parameters["ACC_BITS"]
    assert columns * rows == {8: 2, 7: 3, 6: 4, 5: 4}[level_bits]
    inputs = (*CONTROL, ("w", 4 * columns), ("level", level_bits * rows))
    outputs = (("acc", bits * columns * rows),)

    def run(flags: dict[str, np.ndarray], w: np.ndarray, level: np.ndarray) -> np.ndarray:  # (columns, rows, steps)
        vectors = {
            **flags,
            "w": (w.T.astype(object) << (4 * np.arange(columns))).sum(1),
            "level": (level.T.astype(object) << (level_bits * np.arange(rows))).sum(1),
        }
        acc = simulate(tmp_path, "level_lanes", parameters, inputs, outputs, vectors)[0]
        lanes = [np.array([(x >> (bits * i)) % 2**bits for x in acc], object) for i in range(columns * rows)]
        return np.array(lanes).reshape(columns, rows, -1)

    w, level, column, row = exhaustive(16, 2**level_bits, columns, rows)
    rng, steps = np.random.default_rng(level_bits), np.arange(len(w))
    others = rng.integers(0, 16, (columns, len(w))), rng.integers(0, 2**level_bits, (rows, len(w)))
    others[0][column, steps], others[1][row, steps] = w, level
    ones = np.ones(len(w), int)
    got = run({"clear": ones, "valid": ones}, *others)
    assert np.array_equal(got, others[0][:, None] * others[1][None])

    count = 2**synthesis.SUM_LOG2
    clear = np.zeros(count, int)
    clear[0] = 1
    full = run(
        {"clear": clear, "valid": np.ones(count, int)},
        np.full((columns, count), 15),
        np.full((rows, count), 2**level_bits - 1),
    )
    assert set(full[..., -1].ravel()) == {15 * (2**level_bits - 1) * count}


def test_products_fill_a_dsp_as_far_as_its_operands_reach() -> None:
    assert packing(4, 4) == (2, 2), "the four of the public INT4 designs"
    for bits, level_bits in ((4, 8), (4, 7), (4, 6), (8, 8), (2, 8)):
        columns, rows = packing(bits, level_bits)
        step = bits + level_bits
        assert (columns - 1) * rows * step + bits <= 26 and (rows - 1) * step + level_bits <= 17


@pytest.mark.parametrize("levels", [2, 4, 8])
def test_hluq_sums_are_the_quantizers_values(levels: int) -> None:
    """The two sums, scaled, are the product with the decoded activations: what the method computes."""
    rng = np.random.default_rng(levels)
    w, a = rng.integers(0, 16, (2, 500))
    quantizer = Hybrid(minimum=-0.17, scale_log=0.3, scale_uniform=0.21, log_levels=float(levels), bits=4)
    log, uniform = hluq_sums(w, a, levels, max_shift=7)
    ours = 0.3 * 2.0**-7 * log + 0.21 * uniform - 0.17 * w.sum()
    assert ours == pytest.approx(float((w * np.asarray(quantizer.decode(a), np.float64)).sum()), rel=1e-6)


@pytest.mark.parametrize("tau", [1, 2, 4])
def test_agq_sums_are_the_quantizers_values(tau: int) -> None:
    rng = np.random.default_rng(tau)
    v, k = rng.integers(0, 16, (2, 500))
    shift = synthesis.agq_octaves(4, tau) - 1
    sums = agq_sums(v, k, 4, tau, shift)
    ours = 0.9 * 2.0**-shift * sum(2.0 ** (-r / tau) * sums[r] for r in range(tau))
    decoded = np.asarray(Log2(scale=0.9, tau=tau, bits=4).decode(k), np.float64)
    assert ours == pytest.approx(float((v * decoded).sum()), rel=1e-6)


@pytest.mark.parametrize("grid_bits", [6, 8])
@pytest.mark.parametrize(
    "quantizer",
    [
        Uniform(np.float32(0.3), np.float32(5), 4),
        Grouped(np.array([0.1, 0.31], np.float32), np.array([3, 9], np.float32), np.arange(60) % 2, 4),
        Hybrid(minimum=-0.17, scale_log=0.3, scale_uniform=0.21, log_levels=4.0, bits=4),
        Log2(scale=0.9, tau=2, bits=4),
    ],
    ids=lambda quantizer: type(quantizer).__name__,
)
def test_the_sum_of_levels_is_the_quantizers_value(quantizer: Quantizer, grid_bits: int) -> None:
    """One integer sum, scaled once, is the product with the decoded activations of every kind on the grid."""
    kind = kind_of(quantizer)
    quantizer = kind.on_grid(quantizer, grid_bits)
    levels, rng = kind.levels(quantizer), np.random.default_rng(grid_bits)
    w, codes, zero = rng.integers(0, 16, 60), rng.integers(0, 16, 60), 7
    step, offset, table = (np.asarray(x, np.float64) for x in levels)
    # The element is unsigned: the least level of each channel moves into the offset, known before the run.
    least = table.min(0)
    unsigned = (table - least).astype(int).T.reshape(-1, 16)
    assert 0 <= unsigned.min() and unsigned.max() < 2**grid_bits
    parts = np.arange(60) if len(unsigned) == 60 else 0
    total = level_sum(w, codes, unsigned, parts) - zero * level_sum(np.ones(60, int), codes, unsigned, parts)
    ours = step * total + ((offset + step * least) * (w - zero)).sum()
    decoded = np.asarray(quantizer.decode(codes), np.float64)
    assert ours == pytest.approx(float(((w - zero) * decoded).sum()), rel=1e-5, abs=1e-5)


@needs_yosys
@pytest.mark.parametrize(
    "key",
    [
        "mac_b4",
        "hluq_b4",
        "levels_b4_l8",
        *(
            pytest.param(k, marks=pytest.mark.slow)
            for k in (
                *("agq_b4_tau2", "cag_column_b4_g4", "hluq_dsp_b4"),
                *("levels_b4_l7", "levels_b4_l6", "level_table_a4_l8", "level_table_a6_l8", "level_lanes_b4_l8"),
            )
        ),
    ],
)
def test_areas_are_what_yosys_measures(key: str) -> None:
    top, parameters, dsp = synthesis.designs()[key]
    cells, recorded = synthesis.synthesize(top, parameters, dsp=dsp), yosys_cells()[key]
    print(key, cells)
    # Other versions of Yosys map a little differently.
    assert cells.lut == pytest.approx(recorded["lut"], rel=0.15)
    assert (cells.ff, cells.dsp) == (recorded["ff"], recorded["dsp"])


def test_every_recorded_area_names_a_design() -> None:
    assert set(yosys_cells()) == set(synthesis.designs())


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="Debian package yosys"):
        synthesis.synthesize("int_mac_pe", mac_parameters(4))
