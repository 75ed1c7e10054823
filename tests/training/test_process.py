"""Memory that a step frees serves the next one: no page is asked of the system again."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import os, resource, torch
from lowcal.training.process import keep_freed_memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    activations = [torch.ones(12_000_000) for n in range(2)]  # 48 MB each
def median():
    found = []
    for _ in range(25):
        before = faults()
        step()
        found.append(faults() - before)
    return sorted(found)[12]
child = os.fork()  # which keeps nothing
if child:
    os.waitpid(child, 0)
    assert keep_freed_memory()
print(median(), flush=True)
os._exit(0)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_a_step_gets_the_memory_that_the_last_one_freed():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    plain, kept = map(int, ended.stdout.split())  # of 4 KiB, in the median step: some lay out the heap once more
    assert plain > 20_000
    assert kept < 100
