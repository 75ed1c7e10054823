"""The training that each host must reproduce, as a plain loop."""

import torch
from torch import nn

import lowcal

from ..networks import convnet, images

EPOCHS = 5
OPTIONS = {"rule": lowcal.Hebbian(lr=0.05), "schedule": lowcal.Fixed({1: 1, 3: 2})}  # two moves


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return convnet()


def plain(*, accumulate: int = 1, clip: float | None = None, bf16: bool = False, count: int = 4, **options):
    """The network after this training, and its controller."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    local = lowcal.LoCal(net, optimizer, epochs=EPOCHS, **{**OPTIONS, **options})
    batches = images(count)
    net.train()
    for _ in range(EPOCHS):
        losses = []
        for start in range(0, count, accumulate):
            optimizer.zero_grad()
            for x, y in batches[start : start + accumulate]:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = nn.functional.cross_entropy(net(x), y)
                losses.append(loss.detach())
                (loss / accumulate).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
        local.end_epoch(torch.stack(losses).mean())
    return net, local
