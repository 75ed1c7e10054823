"""An exponential moving average of the weights, by torch.optim.swa_utils."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lowcal

EPOCHS = 6

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
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
local = lowcal.LoCal(
    model, optimizer, epochs=EPOCHS, rule=lowcal.Hebbian(lr=0.001), schedule=lowcal.Fixed({2: 1, 4: 2})
)  # +
averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)

for epoch in range(EPOCHS):
    model.train()
    total = 0.0
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update_parameters(model)  # sees local updates too, since they are part of the step
        total += loss.item()
    local.end_epoch(total / len(batches))  # +
    averaged.eval()
    with torch.no_grad():
        correct = (averaged(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    print(f"epoch {epoch + 1}  accuracy {correct:.1%} of the average  boundary {local.boundary} of {len(local.layers)}")
