"""What every test shares: one thread, a fixed seed, and property-based tests that draw the same cases each time."""

import functools
import gc
import io

import pytest
import torch
from hypothesis import settings
from matplotlib.figure import Figure

import lowcal.training.cost as cost

SAVEFIG = Figure.savefig

settings.register_profile("lowcal", deadline=None, derandomize=True, database=None)
settings.load_profile("lowcal")


def pytest_collection_finish():
    """The libraries' objects stay: they need not be searched for garbage over and over."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Of the whole session, so that what a module's tests share is made under it too."""
    torch.set_num_threads(1)  # sums in one order, and no crowd on a small machine


@pytest.fixture(autouse=True, scope="session")
def _remembered_costs():
    """A dry run takes longer than training a test's network does; the same one is made once."""
    dry_cost, known = cost.dry_cost, {}

    @functools.wraps(dry_cost)
    def remember(method, shape, *, precision, cached=False):
        weights = [(name, value.shape, value.requires_grad) for name, value in method.model.named_parameters()]
        momentum = [group.get("momentum") for group in method.optimizer.param_groups]
        sizes = str((type(method.optimizer), momentum, weights, shape, precision, cached))
        key = (str(method.model), method.name, method.boundary, str(method.settings), sizes)
        if key not in known:
            known[key] = dry_cost(method, shape, precision=precision, cached=cached)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "dry_cost", remember)
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def undrawn():
    """Pictures are written empty: drawing one takes longer than training a test's network does."""

    def savefig(figure, stream, **options):
        stream.write("<svg ></svg>" if isinstance(stream, io.StringIO) else b"<svg></svg>")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield


@pytest.fixture
def drawn(monkeypatch):
    """Pictures are drawn after all."""
    monkeypatch.setattr(Figure, "savefig", SAVEFIG)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, in which the default folders are made too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
