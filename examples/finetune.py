"""A network of torchvision with weights from a file: its first layers are frozen, the others learn a new task."""

import tempfile

import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn

import lowcal

EPOCHS = 2

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1).expand(-1, 3, -1, -1) / 16
images = nn.functional.interpolate(images, size=16)
labels = torch.tensor(digits.target)


def learn(model, optimizer, chosen):
    """One epoch; returns the mean loss."""
    total = 0.0
    for index in chosen.split(25):
        loss = nn.functional.cross_entropy(model(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() / len(chosen.split(25))
    return total


# The file, which you would download: a ResNet18 that has learned the digits 0 to 4.
first = torchvision.models.resnet18(num_classes=10)
learn(first, torch.optim.Adam(first.parameters(), lr=0.001), (labels < 5).nonzero().flatten()[:250])
with tempfile.NamedTemporaryFile(suffix=".pt") as file:
    torch.save(first.state_dict(), file.name)
    weights = torch.load(file.name, weights_only=True)

model = torchvision.models.resnet18(num_classes=10)
model.load_state_dict(weights)
model.fc = nn.Linear(512, 10)  # the new task: the digits 5 to 9
optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
local = lowcal.LoCal(
    model, optimizer, epochs=EPOCHS, rule=lowcal.Frozen(), schedule=lowcal.Fixed({0: 10}), supervision=None,
    norm_stats="running", example_inputs=images[:1],
)  # fmt: skip  # +
task = (labels >= 5).nonzero().flatten()
for epoch in range(EPOCHS):
    model.train()
    local.end_epoch(learn(model, optimizer, task[:250]))  # +
    model.eval()
    with torch.no_grad():
        correct = (model(images[task[250:350]]).argmax(1) == labels[task[250:350]]).float().mean()
    print(f"epoch {epoch + 1}  accuracy {correct:.1%}  boundary {local.boundary} of {len(local.layers)}")
