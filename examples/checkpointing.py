"""Gradient checkpointing, with use_reentrant=False: the run is the same as without."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowcal

EPOCHS = 6

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
batches = list(zip(images[:1500].split(50), labels[:1500].split(50), strict=True))


class Net(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.checkpointed = checkpointed
        self.blocks = nn.ModuleList([
            nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(32, 32, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, padding=1), nn.ReLU()),
        ])  # fmt: skip
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x.flatten(1))


def train(checkpointed):
    torch.manual_seed(0)
    model = Net(checkpointed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    local = lowcal.LoCal(
        model, optimizer, epochs=EPOCHS, rule=lowcal.Hebbian(lr=0.001), schedule=lowcal.Fixed({2: 1, 4: 3})
    )  # + boundary 1 is within a checkpointed block
    for _ in range(EPOCHS):
        total = 0.0
        for x, y in batches:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        local.end_epoch(total / len(batches))  # +
    print(f"checkpointed: {checkpointed}  loss {total / len(batches):.6f}  boundary {local.boundary}")
    return model.state_dict()


weights = [train(checkpointed) for checkpointed in (False, True)]
