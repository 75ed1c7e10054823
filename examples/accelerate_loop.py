"""A loop with Accelerate and LoCal; what differs from plain Accelerate is marked +."""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn

import lowcal
from lowcal.integrations.accelerate import prepare_local  # +

EPOCHS = 6

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
data = torch.utils.data.TensorDataset(images[:1500], labels[:1500])

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Flatten(), nn.Linear(128, 10),
)  # fmt: skip
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
accelerator = Accelerator()
model, optimizer, local = prepare_local(  # + instead of accelerator.prepare
    accelerator, model, optimizer, epochs=EPOCHS, rule=lowcal.Hebbian(lr=0.001), schedule=lowcal.Fixed({2: 1, 4: 2})
)
loader = accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=50, shuffle=True))

for epoch in range(EPOCHS):
    model.train()
    total = 0.0
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.item()
    local.end_epoch(total / len(loader))  # +
    model.eval()
    with torch.no_grad():
        outputs = model(images[1500:].to(accelerator.device))
        correct = (outputs.argmax(1).cpu() == labels[1500:]).float().mean()
    accelerator.print(f"epoch {epoch + 1}  accuracy {correct:.1%}  boundary {local.boundary} of {len(local.layers)}")
