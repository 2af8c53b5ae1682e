"""Freed memory stays with the process where the C library is glibc."""

import platform
import subprocess
import sys

import pytest

# Page faults of five arrays made one after another, after one for the allocator to learn from.
FAULTS = """
import resource, sys
import numpy as np
from experiments.job.allocator import keep_pages

if sys.argv[1] == "keep":
    assert keep_pages()
np.ones(2**24, np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(2**24, np.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's allocator")
def test_pages_are_kept():
    faults = {}
    for how in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["keep"] < 100 < faults["leave"]
