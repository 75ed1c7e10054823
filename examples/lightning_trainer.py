"""A LightningModule with LoCal: only the callback is new (marked +)."""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn

import lowcal
from lowcal.integrations.lightning import LoCalCallback  # +


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
data = torch.utils.data.TensorDataset(images, torch.tensor(digits.target))
train, test = (torch.utils.data.Subset(data, range(*part)) for part in ((1500,), (1500, 1797)))

trainer = pl.Trainer(
    max_epochs=6, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[LoCalCallback(rule=lowcal.Hebbian(lr=0.001), schedule=lowcal.Fixed({2: 1, 4: 2}))],  # +
)  # fmt: skip
trainer.fit(
    Digits(),
    torch.utils.data.DataLoader(train, batch_size=50, shuffle=True),
    torch.utils.data.DataLoader(test, batch_size=297),
)
metrics = trainer.callback_metrics
print(f"accuracy {metrics['accuracy']:.1%}  boundary {metrics['lowcal/boundary']:.0f}")
