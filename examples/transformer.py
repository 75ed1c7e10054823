"""A transformer whose blocks use nn.MultiheadAttention; its projections follow the layer that ran before them."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import lowcal

EPOCHS = 8

torch.manual_seed(0)
images, labels = load_digits().images, torch.tensor(load_digits().target)
rows = torch.tensor(images, dtype=torch.float32) / 16  # (N, 8 tokens, 8 features)
batches = list(zip(rows[:1500].split(50), labels[:1500].split(50), strict=True))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.narrow(self.wide(self.norm2(x)).relu())


class Transformer(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 10)
        self.place = nn.Parameter(0.1 * torch.randn(8, width))
        self.blocks = nn.Sequential(Block(width), Block(width))

    def forward(self, x):
        return self.head(self.blocks(self.embed(x) + self.place).mean(1))


model = Transformer()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
local = lowcal.LoCal(
    model, optimizer, epochs=EPOCHS, rule=lowcal.Hebbian(lr=0.0003), schedule=lowcal.Fixed({4: 1, 6: 3})
)  # +
for epoch in range(EPOCHS):
    model.train()
    total = 0.0
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    local.end_epoch(total / len(batches))  # +
    model.eval()
    with torch.no_grad():
        correct = (model(rows[1500:]).argmax(1) == labels[1500:]).float().mean()
    print(f"epoch {epoch + 1}  accuracy {correct:.1%}  boundary {local.boundary} of {len(local.layers)}")
