"""Two optimizers for one network: Muon for the matrices between first and last layer, AdamW for the rest."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import lowcal

EPOCHS = 6

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
batches = list(zip(images[:1500].split(50), labels[:1500].split(50), strict=True))

model = nn.Sequential(
    nn.Flatten(), nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(),
    nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10),
)  # fmt: skip
hidden = [model[4].weight, model[7].weight]
rest = [parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in hidden)]
muon = torch.optim.Muon(hidden, lr=0.02)
adamw = torch.optim.AdamW(rest, lr=0.003)
local = lowcal.LoCal(
    model, [muon, adamw], epochs=EPOCHS, rule=lowcal.Hebbian(lr=0.001), schedule=lowcal.Fixed({2: 1, 4: 2})
)  # + all optimizers

for epoch in range(EPOCHS):
    model.train()
    total = 0.0
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y)
        for optimizer in (muon, adamw):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (muon, adamw):
            optimizer.step()
        total += loss.item()
    local.end_epoch(total / len(batches))  # +
    model.eval()
    with torch.no_grad():
        correct = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    print(f"epoch {epoch + 1}  accuracy {correct:.1%}  boundary {local.boundary} of {len(local.layers)}")
