"""torch.compile before LoCal and after it: either way the run is the same."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import lowcal

EPOCHS = 6
BACKEND = "eager"  # needs no compiler; "inductor", the default of torch.compile, is the fast one
torch._dynamo.config.skip_nnmodule_hook_guards = False  # a compiled network must see hooks that are added later

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
batches = list(zip(images[:1500].split(50), labels[:1500].split(50), strict=True))


def train(compiled):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if compiled == "before":
        model = torch.compile(model, backend=BACKEND)
    local = lowcal.LoCal(
        model, optimizer, epochs=EPOCHS, rule=lowcal.Hebbian(lr=0.001), schedule=lowcal.Fixed({2: 1, 4: 2})
    )  # +
    if compiled == "after":
        model = torch.compile(model, backend=BACKEND)
    for _ in range(EPOCHS):
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
        correct = (local.model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    print(f"compiled {compiled} LoCal: accuracy {correct:.1%}  boundary {local.boundary} of {len(local.layers)}")
    return local.model.state_dict()


weights = {compiled: train(compiled) for compiled in ("before", "after")}
