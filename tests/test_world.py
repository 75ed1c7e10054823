"""Processes of tests: none is forked once a GPU is in use, where autograd's threads would be missing in the child."""

import re
from pathlib import Path

import pytest
import torch

from .world import apart, processes


@pytest.mark.parametrize(
    ("initialised", "cuda", "method"), [(False, False, "fork"), (False, True, "spawn"), (True, False, "spawn")]
)
def test_no_process_is_forked_once_a_gpu_is_in_use(monkeypatch, initialised, cuda, method):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    assert processes(cuda=cuda).get_start_method() == method


def test_a_task_that_could_not_be_spawned_is_refused_without_a_gpu_too():
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        apart(1, lambda: None)


def test_all_tests_start_their_processes_there():
    starts = re.compile(r"get_context\(|set_start_method\(|multiprocessing\.Process\(|multiprocessing\.spawn")
    here = Path(__file__).parent
    files = {str(file.relative_to(here)) for file in here.rglob("*.py") if starts.search(file.read_text())}
    assert files - {Path(__file__).name} == {"world.py"}
