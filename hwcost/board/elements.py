"""The integer sums that the processing elements in `rtl/` compute, in NumPy: what the hardware is checked against.

Codes are in the layouts of `ahcptq_jax.quantizers`; weights are unsigned codes, their zero point is corrected outside.
All functions take arrays of one shape (steps, ...) and sum over the first axis.
"""

import numpy as np


def mac_sum(w: np.ndarray, a: np.ndarray) -> np.ndarray:
    """sum w*a (`int_mac_pe.v`)."""
    return (w.astype(np.int64) * a).sum(0)


def level_sum(w: np.ndarray, codes: np.ndarray, table: np.ndarray, parts: np.ndarray | int = 0) -> np.ndarray:
    """sum w*level (`level_table.v` before `int_mac_pe.v` or `level_lanes.v`): any quantizer on the grid.

    `sum (w - z_w) * value(code)` is `step * (sum w*level - z_w * sum level) + offset * sum (w - z_w)`; of these the sum
    of the levels alone is found at run time, once for a row.

    Args:
        w: weight codes.
        codes: activation codes.
        table: (parts, 2^bits) whole levels.
        parts: which part of the table each channel's group reads.
    """
    return (w.astype(np.int64) * table[parts, codes]).sum(0)


def hluq_sums(w: np.ndarray, a: np.ndarray, levels: int, max_shift: int) -> tuple[np.ndarray, np.ndarray]:
    """(logarithmic, uniform) sums of a hybrid layer (`hluq_pe.v`).

    `sum w * (value(a) - minimum)` is `scale_log * 2^-max_shift * logarithmic + scale_uniform * uniform`, exactly as
    long as `levels - 1 <= max_shift`; smaller values are dropped.

    Args:
        w: weight codes.
        a: activation codes.
        levels: number of logarithmic codes; 0 makes it a plain multiply-accumulate in the second sum.
        max_shift: reach of the shifter.
    """
    w, a = w.astype(np.int64), a.astype(np.int64)
    uniform = a > levels
    shift = np.where(uniform, max_shift, max_shift - a)
    nothing = (a == levels) | (shift < 0)
    log = np.where(nothing, 0, w << np.maximum(shift, 0))
    return log.sum(0), np.where(uniform, w * (a - levels), 0).sum(0)


def agq_sums(v: np.ndarray, k: np.ndarray, bits: int, tau: int, max_shift: int) -> np.ndarray:
    """(tau, ...) sums of an attention's second product, one for each residue of the code mod tau (`agq_pe.v`).

    `sum v * value(k)` is `scale * 2^-max_shift * sum_r 2^(-r/tau) * sums[r]`, as long as the shifter reaches.

    Args:
        v: value codes.
        k: softmax codes; the last one is zero.
        bits: width of k.
        tau: levels per octave.
        max_shift: reach of the shifter.
    """
    v, k = v.astype(np.int64), k.astype(np.int64)
    shift = max_shift - k // tau
    term = np.where((k == 2**bits - 1) | (shift < 0), 0, v << np.maximum(shift, 0))
    return np.stack([np.where(k % tau == r, term, 0).sum(0) for r in range(tau)])


def column_sums(w: np.ndarray, a: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """(groups, ...) sums of w*a, one for each label (`cag_column.v`)."""
    product = w.astype(np.int64) * a
    return np.stack([np.where(group == g, product, 0).sum(0) for g in range(groups)])
