"""Automatic mixed precision: bfloat16 without a scaler, float16 with one."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import lowcal

EPOCHS = 6

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
batches = list(zip(images[:1500].split(50), labels[:1500].split(50), strict=True))


def train(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(),
        nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, enabled=dtype is torch.float16)
    local = lowcal.LoCal(
        model, optimizer, epochs=EPOCHS, rule=lowcal.Hebbian(lr=0.001), schedule=lowcal.Fixed({2: 1, 4: 2})
    )  # +
    for _ in range(EPOCHS):
        model.train()
        total = 0.0
        for x, y in batches:
            with torch.autocast("cpu", dtype):
                loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)  # a step that overflows is skipped, and its local updates with it
            scaler.update()
            total += loss.item()
        local.end_epoch(total / len(batches))  # +
    model.eval()
    with torch.no_grad():
        correct = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    print(f"{dtype}: accuracy {correct:.1%}  boundary {local.boundary} of {len(local.layers)}")
    return scaler


scalers = [train(dtype) for dtype in (torch.bfloat16, torch.float16)]
