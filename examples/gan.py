"""A GAN: each of its two networks has a LoCal of its own."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import lowcal

EPOCHS = 4

torch.manual_seed(0)
images = torch.tensor(load_digits().images, dtype=torch.float32).flatten(1) / 8 - 1
criterion = nn.BCEWithLogitsLoss()

generator = nn.Sequential(
    nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64),
    nn.Tanh(),
)  # fmt: skip
discriminator = nn.Sequential(
    nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)
)
optimizers = [torch.optim.Adam(net.parameters(), lr=0.001, betas=(0.5, 0.999)) for net in (generator, discriminator)]
controllers = [
    lowcal.LoCal(net, optimizer, epochs=EPOCHS, rule=lowcal.Hebbian(lr=0.0003), schedule=lowcal.Fixed({2: 1}))
    for net, optimizer in zip((generator, discriminator), optimizers, strict=True)
]  # +

for epoch in range(EPOCHS):
    totals = [0.0, 0.0]
    batches = images[torch.randperm(len(images))].split(64)
    for real in batches:
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        fake = generator(torch.randn(len(real), 16))

        loss = criterion(discriminator(real), ones) + criterion(discriminator(fake.detach()), zeros)
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        totals[1] += loss.item() / len(batches)

        loss = criterion(discriminator(fake), ones)  # goes back through the discriminator's local layers too
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        totals[0] += loss.item() / len(batches)
    for local, total in zip(controllers, totals, strict=True):
        local.end_epoch(total)  # +
    boundaries = ", ".join(f"{local.boundary} of {len(local.layers)}" for local in controllers)
    print(f"epoch {epoch + 1}  losses {totals[0]:.3f} and {totals[1]:.3f}  boundaries {boundaries}")
