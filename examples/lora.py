"""LoRA next to a frozen prefix: an adapted layer is one layer, and its adapters stop learning with it."""

import peft
import torch
from sklearn.datasets import load_digits
from torch import nn

import lowcal

EPOCHS = 6

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target)

base = nn.Sequential(
    nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
)
optimizer = torch.optim.Adam(base.parameters(), lr=0.003)
for _ in range(5):  # stands for pre-training, on the digits upside down
    for x, y in zip(images[:1000].flip(1).split(50), labels[:1000].split(50), strict=True):
        loss = nn.functional.cross_entropy(base(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

config = peft.LoraConfig(target_modules=["0", "2", "4"], modules_to_save=["6"], r=8)
model = peft.get_peft_model(base, config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.005)
local = lowcal.LoCal(model, optimizer, epochs=EPOCHS, rule=lowcal.Frozen(), schedule=lowcal.Fixed({2: 1, 4: 2}))  # +
for epoch in range(EPOCHS):
    model.train()
    total = 0.0
    for x, y in zip(images[:1500].split(50), labels[:1500].split(50), strict=True):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    local.end_epoch(total / 30)  # +
    model.eval()
    with torch.no_grad():
        correct = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    print(f"epoch {epoch + 1}  accuracy {correct:.1%}  boundary {local.boundary} of {len(local.layers)}")

outputs = model(images[1500:])
local.detach()  # before the adapters are merged
merged = model.merge_and_unload()
