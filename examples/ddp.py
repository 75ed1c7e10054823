"""A data-parallel loop with LoCal, each batch spread over all ranks; what differs from plain DDP is marked +.

Run it with `torchrun --standalone --nproc-per-node 2 examples/ddp.py`. On GPUs, give init_process_group "nccl" and move
model and data to the rank's own.
"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

import lowcal

EPOCHS = 6

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
batches = [
    (x[rank::ranks], y[rank::ranks]) for x, y in zip(images[:1500].split(50), labels[:1500].split(50), strict=True)
]

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
    nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
    nn.Flatten(), nn.Linear(128, 10),
)  # fmt: skip
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
local = lowcal.LoCal(
    model, optimizer, epochs=EPOCHS, rule=lowcal.Refresh(every=4), schedule=lowcal.Fixed({2: 1, 4: 2})
)  # +
parallel = lowcal.DistributedLoCal(model, local)  # + instead of DistributedDataParallel(model)

for epoch in range(EPOCHS):
    model.train()
    total = 0.0
    for x, y in batches:
        loss = criterion(parallel(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    local.end_epoch(total / len(batches))  # + the mean over the ranks decides, so that all move alike
    model.eval()
    with torch.no_grad():
        correct = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    if rank == 0:
        boundary = f"boundary {local.boundary} of {len(local.layers)}, {parallel.bytes_per_step()} bytes a step"
        print(f"epoch {epoch + 1}  accuracy {correct:.1%}  {boundary}")

dist.destroy_process_group()
