"""An LSTM that reads a digit row by row. Its weights follow the layer before it, and stop learning with it."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import lowcal

EPOCHS = 8

torch.manual_seed(0)
digits = load_digits()
rows = torch.tensor(digits.images, dtype=torch.float32) / 16  # (N, 8 steps, 8 features)
labels = torch.tensor(digits.target)
batches = list(zip(rows[:1500].split(50), labels[:1500].split(50), strict=True))


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.lstm = nn.LSTM(32, 64, batch_first=True)
        self.hidden, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x):
        states, _ = self.lstm(self.embed(x).relu())
        return self.head(self.hidden(states[:, -1]).relu())


model = Reader()
optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
local = lowcal.LoCal(model, optimizer, epochs=EPOCHS, rule=lowcal.Frozen(), schedule=lowcal.Fixed({6: 1}))  # +
for epoch in range(EPOCHS):
    model.train()
    total = 0.0
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
    local.end_epoch(total / len(batches))  # +
    model.eval()
    with torch.no_grad():
        correct = (model(rows[1500:]).argmax(1) == labels[1500:]).float().mean()
    print(f"epoch {epoch + 1}  accuracy {correct:.1%}  boundary {local.boundary} of {len(local.layers)}")
