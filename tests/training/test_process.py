"""Memory that a step frees serves the next one: no page is asked of the system again."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from lowcal.training.process import keep_freed_memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    activations = [torch.ones(12_000_000) for n in range(2)]  # 48 MB each
def median():
    found = []
    for _ in range(9):
        before = faults()
        step()
        found.append(faults() - before)
    return sorted(found)[4]
before = median()
assert keep_freed_memory()
print(before, median())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_a_step_gets_the_memory_that_the_last_one_freed():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    before, after = map(int, ended.stdout.split())  # of 4 KiB, in the median step: some lay out the heap once more
    assert before > 20_000
    assert after < 100
