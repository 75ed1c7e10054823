"""The callback for Lightning: the weights of a plain loop, exact resume, logged scalars, and mistakes."""

import csv

import pytest
import torch

pytest.importorskip("lightning", reason="Lightning is not installed")

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lowcal
from lowcal.integrations.lightning import LoCalCallback

from ..support import same, weights
from .lightning_modules import Classifier, Manual, Whole, loader, trainer
from .plain import EPOCHS, OPTIONS, plain

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's own advice


def callback(**options):
    return LoCalCallback(**{**OPTIONS, **options})


def same_weights(module, net):
    return all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), weights(net).values(), strict=True))


@pytest.mark.parametrize("kind", [Classifier, Whole])
@pytest.mark.parametrize("rule", [lowcal.Hebbian(lr=0.05, every=2), lowcal.Frozen(), lowcal.Refresh(every=2)], ids=str)
def test_trains_as_a_plain_loop_does(kind, rule, tmp_path):
    module, own = kind(), callback(rule=rule)
    trainer(tmp_path, own).fit(module, loader())
    net, local = plain(rule=rule)
    assert same_weights(module, net)
    assert own.local.history == local.history == ((1, 1), (3, 2))
    assert all(parameter.requires_grad for parameter in module.parameters())  # given back at the end


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
        ({"gradient_clip_val": 0.1}, {"clip": 0.1}),
        ({"precision": "bf16-mixed"}, {"bf16": True}),
    ],
    ids=["accumulation", "clipping", "bf16"],
)
def test_options_of_the_trainer(options, reference, tmp_path):
    module, own = Classifier(), callback()
    trainer(tmp_path, own, **options).fit(module, loader())
    net, local = plain(**reference)
    assert same_weights(module, net)
    assert own.local.state_dict()["losses"] == pytest.approx(local.state_dict()["losses"], rel=1e-5)


def test_manual_optimization_with_a_chosen_optimizer(tmp_path):
    module = Manual()
    trainer(tmp_path, callback(network="net", optimizer=1)).fit(module, loader())
    assert same_weights(module.net, plain()[0])


def test_a_list_of_optimizers(tmp_path):
    module = Manual()
    own = callback(network="net", optimizer=[0, 1])
    trainer(tmp_path, own).fit(module, loader())
    assert same_weights(module.net, plain()[0])


def test_local_from_the_start_needs_the_example(tmp_path):
    options = {"schedule": lowcal.Fixed({0: 1, 2: 2}), "example_inputs": loader().batches[0][0]}
    module = Classifier()
    trainer(tmp_path, callback(**options)).fit(module, loader())
    assert same_weights(module, plain(**options)[0])


SAVES = {
    "epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},  # after the last batch, before the end
    "steps": {"every_n_train_steps": 1},
}


@pytest.mark.parametrize("saves", SAVES)
def test_resumes_exactly_from_each_of_the_hosts_checkpoints(saves, tmp_path):
    def run(folder, ckpt=None, **options):
        module, own = Classifier(), callback(schedule=lowcal.NormTrend(alpha=1.5, shift=1, interval=1))
        keep = ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **SAVES[saves])
        host = trainer(folder, own, keep, enable_checkpointing=True, limit_val_batches=1, **options)
        host.fit(module, loader(3), loader(1), ckpt_path=ckpt)
        return module, own

    module, own = run(tmp_path / "whole")
    final = own.state_dict()
    assert len(own.local.history) >= 2
    saved = sorted((tmp_path / "whole").glob("*.ckpt"))
    assert len(saved) == (3 * EPOCHS if saves == "steps" else EPOCHS)
    for index, path in enumerate(saved[: 3 * EPOCHS - 1]):
        torch.load(path, weights_only=True)
        again, resumed = run(tmp_path / str(index), path)
        assert same(weights(again), weights(module)), path.name
        assert same(resumed.state_dict(), final), path.name


def test_logs_go_to_the_trainers_logger(tmp_path):
    own = callback()
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, own, logger=logger).fit(Classifier(), loader())
    with open(logger.log_dir + "/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lowcal/boundary"]) for row in rows] == [0, 1, 1, 2, 2]
    assert float(rows[-1]["lowcal/change"]) == pytest.approx(own.local.change)
    assert {float(row["lowcal/sign"]) for row in rows} <= {-1.0, 1.0}
