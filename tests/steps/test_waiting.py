"""Nothing in an epoch waits for the device, and nothing in a step is made on another one: found without a GPU."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowcal.data import Augmentation, Batches
from lowcal.data.mixing import Mixing
from lowcal.methods import METHODS, build_method
from lowcal.steps import graphed, step
from lowcal.steps.step import EagerStep, StepOptions

from ..training.runs import OTHER_SETTINGS, images, make_run, network, run_on, settings
from .software_graphs import SoftwareGraphs

ATEN = torch.ops.aten
WAITING = {  # on a GPU the host reads what these give, or how much it is
    ATEN._local_scalar_dense,
    ATEN.equal,
    ATEN.is_nonzero,
    ATEN.masked_select,
    ATEN.nonzero,
    ATEN._unique2,
    ATEN.unique_dim,
    ATEN.unique_consecutive,
}
TUNED = {"ema_decay": 0.9, "warmup_epochs": 1.5, "mixing": Mixing(3, 0.4, 1.0), "label_smoothing": 0.1}
MASKS = (torch.bool, torch.uint8)


class Waits(TorchDispatchMode):
    """Counts the operations at which the host would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        by_mask = packet in (ATEN.index, ATEN.index_put_) and any(i is not None and i.dtype in MASKS for i in args[1])
        if packet in WAITING or by_mask:
            self.found[str(packet)] += 1
        return func(*args, **(kwargs or {}))


def waits_in_an_epoch(path, method, batch, **options):
    """Of the second epoch, in which layers are local; but for dry runs, which are of no device."""
    local = settings(moves={1: 4}, every=2, refresh_every=3)
    run = run_on(make_run(path, method, fused=True, checkpoint=False, local=local, **options), 1)
    run.train.batch = run._loop.test.batch = batch
    run._loop._meter.count = lambda shapes, peak, fills: (0, 1)
    with Waits() as waits:
        run.run_epoch()
    return waits.found


@pytest.mark.parametrize(
    ("method", "options"),
    [(method, {}) for method in ("local", "refresh", "stochastic-depth", "prune")]
    + [("local", {"precision": precision, "max_skips": 9}) for precision in ("float32", "fp16")]
    + [("sgd", {"precision": "fp16"}), ("local", TUNED)],
)
def test_an_epoch_waits_as_often_however_many_steps_it_has(tmp_path, method, options):
    few, many = (waits_in_an_epoch(tmp_path / str(batch), method, batch, **options) for batch in (11, 4))
    assert few == many
    assert few.total() > 0  # the losses and the errors are read at its end


@pytest.mark.parametrize(("method", "options"), [("local", {}), ("refresh", {}), ("local", TUNED)])
def test_so_does_one_of_recorded_steps(tmp_path, monkeypatch, method, options):
    monkeypatch.setattr(graphed, "GRAPHS", SoftwareGraphs)
    few, many = (waits_in_an_epoch(tmp_path / str(b), method, b, step="graphed", **options) for b in (11, 4))
    assert few == many


def test_what_waits_is_found():
    with Waits() as waits:
        values = torch.arange(3.0)
        float(values[0]), bool(values.isfinite().all()), values[values > 1], values.nonzero()
    assert waits.found == {"aten._local_scalar_dense": 2, "aten.index": 1, "aten.nonzero": 1}


class OneDevice(TorchDispatchMode):
    """Once it is strict, lets no tensor be elsewhere than on `device`; passes over the fused optimizer's kernel."""

    def __init__(self, device):
        super().__init__()
        self._device = device
        self.fused_steps = 0
        self.is_strict = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_fused = func.overloadpacket is ATEN._fused_sgd_
        self.fused_steps += is_fused
        outputs = None if is_fused else func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, outputs)):
            assert not (self.is_strict and isinstance(leaf, Tensor)) or leaf.device == self._device, func
        return outputs


@pytest.mark.parametrize(
    ("replayable", "scaled", "guard"),
    [(False, False, False), (False, True, True), (True, False, True), (True, True, False)],
)
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.unreplayable is None])
def test_all_of_a_step_is_on_the_device(monkeypatch, method, replayable, scaled, guard):
    """On the meta device, from whose tensors nothing can be read either."""
    meta = torch.device("meta")
    monkeypatch.setattr(step, "autocast", lambda device, precision: nullcontext())  # there is none for that device
    model = network().to(meta)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for group in optimizer.param_groups:
        group["fused"] = True  # refused when it is built, for this device
    optimizer._need_device_dtype_check_for_fused = False
    optimizer._step_supports_amp_scaling = True
    loader = Batches(
        images(10), batch=5, mean=(0.5, 0.5), std=(0.25, 0.25), augmentation=Augmentation(pad=1, flip=True),
        mixing=Mixing(3, 0.4, 1.0) if guard else None, device=meta,
    )  # fmt: skip
    own = OTHER_SETTINGS.get(METHODS[method].section, settings(every=2, refresh_every=3))
    attached = build_method(method, model, optimizer, own, epochs=9, example_inputs=loader.sample_input(1))
    if METHODS[method].section == "local" and method != "sgd":
        attached.move_to(4)
    if replayable:
        attached.make_replayable(meta)
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    options = StepOptions(meta, scaler=scaler, guard=guard, collate=loader.collate)
    trained = EagerStep(model.train(), (optimizer,), attached, options)
    given = next(loader.raw_batches())
    with OneDevice(meta) as mode:
        trained(*given)  # the count of updates left out follows the first of them to the device
        mode.is_strict = True
        for _ in range(3):
            assert trained(*given).device == meta
    assert mode.fused_steps == 4
    assert trained.skipped is None or trained.skipped.device == meta
