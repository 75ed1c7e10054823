"""What every test shares: one thread, a fixed seed, and property-based tests that draw the same cases each time."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("lowcal", deadline=None, derandomize=True, database=None)
settings.load_profile("lowcal")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Of the whole session, so that what a module's tests share is made under it too."""
    torch.set_num_threads(1)  # sums in one order, and no crowd on a small machine


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
