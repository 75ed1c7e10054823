"""Small networks whose every layer a test can name, and batches for them."""

from collections import OrderedDict

import torch
from torch import Tensor, nn


def mlp(*, bias: bool = True) -> nn.Sequential:
    """Four linear layers named one to four: 4 -> 5 -> 6 -> 5 -> 3."""
    return nn.Sequential(
        OrderedDict(
            one=nn.Linear(4, 5, bias=bias),
            act1=nn.ReLU(),
            two=nn.Linear(5, 6, bias=bias),
            act2=nn.Tanh(),
            three=nn.Linear(6, 5, bias=bias),
            act3=nn.ReLU(),
            four=nn.Linear(5, 3, bias=bias),
        )
    )


def convnet(*, norm: bool = True, inplace: bool = True) -> nn.Sequential:
    """Three convolutions (the second grouped) with batch normalisation, and a classifier, for (N, 2, 6, 6)."""
    layers: list[tuple[str, nn.Module]] = []
    convs = (
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(4, 6, 3, stride=2),
    )
    for index, conv in enumerate(convs, 1):
        layers.append((f"conv{index}", conv))
        if norm:
            layers.append((f"norm{index}", nn.BatchNorm2d(conv.out_channels)))
        layers.append((f"act{index}", nn.ReLU(inplace=inplace)))
    layers += [("flat", nn.Flatten()), ("head", nn.Linear(24, 3))]
    return nn.Sequential(OrderedDict(layers))


class Residual(nn.Module):
    """A residual network that registers its modules in another order than it runs them.

    Runs: stem, first, second, shortcut, middle, head. `gain` is a bare parameter used just before `shortcut` runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.shortcut = nn.Conv2d(3, 4, 1, stride=2)
        self.gain = nn.Parameter(torch.full((1, 4, 1, 1), 0.5))
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.second_norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.first_norm = nn.BatchNorm2d(4)
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.input_norm = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.input_norm(x)).relu()
        y = self.second_norm(self.second(self.first_norm(self.first(x)).relu()))
        x = (self.gain * y + self.shortcut(x)).relu()
        x = self.middle(x).relu()
        return self.head(x.mean((2, 3)))


class Optional(nn.Module):
    """Three hidden layers, of which a call can leave out the second; `skip` says so for the calls to come."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        if not self.skip:
            x = self.two(x).relu()
        return self.head(self.three(x).relu())


def vectors(count: int, *, size: int = 8, features: int = 4, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """`count` batches of (size, features) inputs with labels of three classes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, features, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def images(count: int, *, size: int = 5, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """`count` batches of (size, 2, 6, 6) images with labels of three classes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 2, 6, 6, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]
