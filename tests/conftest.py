"""What every test shares: one thread, a fixed seed, and property-based tests that draw the same cases each time."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("lowcal", deadline=None, derandomize=True, database=None)
settings.load_profile("lowcal")


@pytest.fixture(autouse=True)
def _reproducible():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, and no crowd on a small machine
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
