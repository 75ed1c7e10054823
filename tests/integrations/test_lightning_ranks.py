"""Lightning's DDP in two processes: the weights of one process, over two moves."""

import pytest
import torch
from torch import nn

pytest.importorskip("lightning", reason="Lightning is not installed")

import lightning.pytorch as pl

import lowcal
from lowcal.integrations.lightning import LoCalCallback

from ..ranks import data, network
from ..support import refused
from ..world import apart
from .lightning_modules import Batches, Classifier, trainer
from .plain import EPOCHS

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's own advice

OPTIONS = {"rule": lowcal.Frozen(), "schedule": lowcal.Fixed({1: 1, 3: 2})}
BATCHES = [data(seed) for seed in range(4)]


class Split(pl.LightningModule):
    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.body = network()
        if whole:  # two children, so that the module itself is the network
            self.head = self.body.pop(-1)

    def forward(self, x):
        return self.head(self.body(x)) if hasattr(self, "head") else self.body(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def train(folder, whole, accumulate):
    own, module = LoCalCallback(**OPTIONS), Split(whole)
    host = trainer(folder, own, strategy="ddp", devices=2, accumulate_grad_batches=accumulate)
    rank = host.global_rank
    host.fit(module, Batches([(x[rank::2], y[rank::2]) for x, y in BATCHES]))
    assert own.local.history == ((1, 1), (3, 2))
    torch.save([module.state_dict(), own.state_dict()["local"]["losses"]], folder / f"{rank}.pt")


@pytest.mark.parametrize(("whole", "accumulate"), [(False, 1), (True, 2)])
def test_equal_to_one_process(whole, accumulate, tmp_path):
    assert apart(2, train, tmp_path, whole, accumulate) == [0, 0]
    (first, losses), (second, same_losses) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))
    assert losses == same_losses
    module, own = Split(whole), LoCalCallback(**OPTIONS)
    trainer(tmp_path, own, accumulate_grad_batches=accumulate).fit(module, Batches(BATCHES))
    for name, value in module.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
    assert losses == pytest.approx(own.state_dict()["local"]["losses"], rel=1e-4)
    assert len(losses) == EPOCHS


@pytest.mark.parametrize("rule", [lowcal.Hebbian(), lowcal.Refresh()], ids=str)
def test_a_rule_that_ddp_does_not_sum(rule, tmp_path):
    own = LoCalCallback(rule=rule)
    host = trainer(tmp_path, own, strategy="ddp", devices=2)
    with refused("2 devices", "lowcal.Frozen()"):
        own.setup(host, Classifier(), "fit")
