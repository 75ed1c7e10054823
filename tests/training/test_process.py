"""Memory that a step frees serves the next one: no page is asked of the system again."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from lowcal.training.process import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    activations = [torch.ones(12_000_000) for n in range(2)]  # 48 MB each
found = []
for _ in range(25):
    before = faults()
    step()
    found.append(faults() - before)
print(sorted(found)[12])
"""


def page_faults(keep):
    program = PROGRAM.format(keep=keep)
    return int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_a_step_gets_the_memory_that_the_last_one_freed():
    assert page_faults(keep=True) < 100  # of 4 KiB, in the median step: now and then the heap is laid out anew
    assert page_faults(keep=False) > 20_000  # the same program without it
