"""Mistakes with the callback for Lightning: each gets one line."""

import pytest
import torch

pytest.importorskip("lightning", reason="Lightning is not installed")

import lightning.pytorch as pl

import lowcal
from lowcal.integrations import versions
from lowcal.integrations.lightning import LoCalCallback

from ..support import refused
from .lightning_modules import Classifier, Manual, Whole, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's own advice


def fit(folder, module=None, own=None, **options):
    trainer(folder, own or LoCalCallback(), **options).fit(module or Classifier(), loader())


def test_a_callback_used_twice(tmp_path):
    own = LoCalCallback()
    fit(tmp_path, own=own, max_epochs=1)
    with refused("callback of its own"):
        fit(tmp_path, own=own, max_epochs=1)


def test_two_callbacks_of_one_network(tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `LoCalCallback`"):
        trainer(tmp_path, LoCalCallback(), LoCalCallback())
    with refused("another LoCal"):
        trainer(tmp_path, LoCalCallback(), LoCalCallback(network="net")).fit(Classifier(), loader())


def test_no_number_of_epochs(tmp_path):
    with refused("max_epochs", -1):
        fit(tmp_path, max_epochs=-1)


def test_a_strategy_that_shards(tmp_path):
    host = trainer(tmp_path, LoCalCallback())
    host.strategy.__class__ = type("FSDPStrategy", (pl.strategies.Strategy,), {})
    with refused("FSDPStrategy", "ddp"):
        LoCalCallback().setup(host, Classifier(), "fit")


def test_an_optimizer_without_the_parameters(tmp_path):
    with refused("does not hold"):
        fit(tmp_path, Manual(), LoCalCallback(network="net", optimizer=0))
    with refused("optimizer is 2", "returned 2"):
        fit(tmp_path, Manual(), LoCalCallback(network="net", optimizer=2))


def test_a_submodule_that_does_not_exist(tmp_path):
    with refused("'body'", "choose from net"):
        fit(tmp_path, own=LoCalCallback(network="body"))


def test_a_network_that_training_step_calls_in_parts(tmp_path):
    class Parts(Whole):
        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.head(self.features(batch[0])), batch[1])

    with refused("network='net'"):
        fit(tmp_path, Parts())


def test_no_loss(tmp_path):
    class Silent(Manual):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    with refused("returned no loss"):
        fit(tmp_path, Silent(), LoCalCallback(network="net", optimizer=1))


def test_a_checkpoint_without_the_callback(tmp_path):
    host = trainer(tmp_path, max_epochs=2)
    host.fit(Classifier(), loader())
    host.save_checkpoint(tmp_path / "other.ckpt")
    with refused("epoch 2", "saved with this callback"):
        trainer(tmp_path, LoCalCallback()).fit(Classifier(), loader(), ckpt_path=tmp_path / "other.ckpt")


def test_a_failed_run_leaves_no_hooks(tmp_path):
    class Broken(Classifier):
        def training_step(self, batch, batch_idx):
            if self.current_epoch == 2:
                raise ArithmeticError
            return super().training_step(batch, batch_idx)

    module = Broken()
    with pytest.raises(ArithmeticError):
        fit(tmp_path, module, LoCalCallback(schedule=lowcal.Fixed({1: 1})))
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.net.modules())


def test_a_version_that_is_missing_or_too_old(monkeypatch):
    with refused("not installed", "lowcal[nowhere]"):
        versions.check_host("nowhere", "1.0")
    monkeypatch.setattr(versions, "version", lambda package: "2.4.1")
    with refused("2.5 or later", "2.4.1"):
        versions.check_host("lightning", "2.5")
