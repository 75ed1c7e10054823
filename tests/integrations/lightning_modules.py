"""LightningModules as people write them, trained as plain.py does."""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from ..networks import images
from .plain import EPOCHS, network


class Batches:
    """A loader that can go on in the middle of an epoch, as Lightning asks: it has a state_dict."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches, self.position = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        self.position %= len(self)
        while self.position < len(self):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def loader(count: int = 4) -> Batches:
    return Batches(images(count))


class Classifier(pl.LightningModule):
    """A network in an attribute, and one optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Whole(Classifier):
    """Two children, called through the module's own forward."""

    def __init__(self) -> None:
        super().__init__()
        net = self.net
        del self.net
        self.features, self.head = net[:-1], net[-1]

    def forward(self, x):
        return self.head(self.features(x))

    def training_step(self, batch, batch_idx):
        return {"loss": nn.functional.cross_entropy(self(batch[0]), batch[1])}

    def validation_step(self, batch, batch_idx):
        self(batch[0])


class Manual(Classifier):
    """Manual optimization with two optimizers, of which the second holds the network."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.scale = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        other, own = self.optimizers()
        output = self.net(batch[0])
        loss = nn.functional.cross_entropy(output, batch[1])
        own.zero_grad()
        self.manual_backward(loss)
        own.step()
        other.zero_grad()
        self.manual_backward(self.scale(output.detach().mean().reshape(1)).square().sum())
        other.step()
        return loss.detach()

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.scale.parameters(), lr=0.01),
            torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9),
        ]


def trainer(folder, *callbacks, **options) -> pl.Trainer:
    return pl.Trainer(**{
        "accelerator": "cpu", "max_epochs": EPOCHS, "default_root_dir": str(folder), "callbacks": list(callbacks),
        "enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False,
        "num_sanity_val_steps": 0, **options,
    })  # fmt: skip
