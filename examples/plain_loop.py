"""A plain PyTorch loop with LoCal: two lines more than without (marked +)."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import lowcal

EPOCHS = 12

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
batches = list(zip(images[:1500].split(50), labels[:1500].split(50), strict=True))

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Flatten(), nn.Linear(128, 10),
)  # fmt: skip
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
local = lowcal.LoCal(model, optimizer, epochs=EPOCHS, rule=lowcal.Hebbian(lr=0.001))  # +

for epoch in range(EPOCHS):
    model.train()
    total = 0.0
    for x, y in batches:
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    local.end_epoch(total / len(batches))  # +
    model.eval()
    with torch.no_grad():
        correct = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    boundary = f"boundary {local.boundary} of {len(local.layers)}"
    print(f"epoch {epoch + 1:2}  loss {total / len(batches):.3f}  accuracy {correct:.1%}  {boundary}")
