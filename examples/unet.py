"""A U-Net that finds the strokes of a digit in noise: back-propagation ends at the boundary, in spite of the skips."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import lowcal

EPOCHS = 6

torch.manual_seed(0)
clean = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
masks = (clean > 0.4).float()
noisy = clean + 0.2 * torch.randn_like(clean)
batches = list(zip(noisy[:1500].split(50), masks[:1500].split(50), strict=True))


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.middle = block(1, 8), block(8, 16), block(16, 16)
        self.up2, self.up1 = nn.ConvTranspose2d(16, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.join2, self.join1 = block(32, 16), block(16, 8)
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        one = self.down1(x)
        two = self.down2(nn.functional.max_pool2d(one, 2))
        x = self.middle(nn.functional.max_pool2d(two, 2))
        x = self.join2(torch.cat([self.up2(x), two], 1))
        return self.head(self.join1(torch.cat([self.up1(x), one], 1)))


model = UNet()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
local = lowcal.LoCal(
    model, optimizer, epochs=EPOCHS, rule=lowcal.Hebbian(lr=0.001), schedule=lowcal.Fixed({2: 1, 4: 3})
)  # +
for epoch in range(EPOCHS):
    model.train()
    total = 0.0
    for x, y in batches:
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    local.end_epoch(total / len(batches))  # +
    model.eval()
    with torch.no_grad():
        correct = ((model(noisy[1500:]) > 0) == masks[1500:].bool()).float().mean()
    print(f"epoch {epoch + 1}  accuracy {correct:.1%} of pixels  boundary {local.boundary} of {len(local.layers)}")
