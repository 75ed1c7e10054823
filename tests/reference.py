"""The method by the book, in float64 and without lowcal: what the library's results are held against."""

import itertools

import numpy as np
import torch
from torch import Tensor, nn

PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def weight_product(module: nn.Module, inputs: Tensor, outputs: Tensor) -> Tensor:
    """dW of Eq. 3 by explicit patches and sums: each output position adds (its output) x (the patch it saw)."""
    a, z = (t.detach().double().cpu().numpy() for t in (inputs, outputs))
    if isinstance(module, nn.Linear):
        total = np.zeros(tuple(module.weight.shape))
        for row_a, row_z in zip(a.reshape(-1, a.shape[-1]), z.reshape(-1, z.shape[-1]), strict=True):
            total += np.outer(row_z, row_a)
        return torch.from_numpy(total)

    dims = module.weight.dim() - 2
    if a.ndim == dims + 1:
        a, z = a[None], z[None]
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    a = np.pad(a, [(0, 0), (0, 0), *padding_of(module)], mode=PAD_MODES[module.padding_mode])
    total = np.zeros(tuple(module.weight.shape))
    outs, ins = module.out_channels // module.groups, module.in_channels // module.groups
    for position in itertools.product(*map(range, z.shape[2:])):
        for tap in itertools.product(*map(range, kernel)):
            seen = tuple(p * s + t * d for p, s, t, d in zip(position, stride, tap, dilation, strict=True))
            for group in range(module.groups):
                o, i = slice(group * outs, (group + 1) * outs), slice(group * ins, (group + 1) * ins)
                total[(o, slice(None), *tap)] += z[(slice(None), o, *position)].T @ a[(slice(None), i, *seen)]
    return torch.from_numpy(total)


def padding_of(module: nn.Module) -> list[tuple[int, int]]:
    """Cells added before and after each dimension; 'same' puts the odd cell behind."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in module.padding]


def local_step(weight: Tensor, update: Tensor, eta: float, sign: int = 1, *, relative: bool = False) -> Tensor:
    """Eq. 4 with Algorithm 2's sign: W + s * eta * dW / ||dW||, in float64."""
    weight, update = weight.detach().double(), update.double()
    length = eta * (weight.norm() if relative else 1.0)
    return weight + sign * length * update / update.pow(2).sum().sqrt()


def hand_loop(
    model: nn.Sequential, optimizer: torch.optim.Optimizer, boundary: str, batch, eta: float, sign: int = 1
) -> None:
    """One step of a sequential network as a person would write it: all before `boundary` learns locally (Eqs. 1-4).

    `eta = 0` freezes the prefix. The optimizer sees gradients of the suffix alone.
    """
    images, labels = batch
    names = [name for name, _ in model.named_children()]
    first = names.index(boundary)
    updates = []
    with torch.no_grad():
        a = images
        for module in list(model)[:first]:
            z = module(a)
            if eta and isinstance(module, (nn.Linear, nn.Conv2d)):
                updates.append((module.weight, weight_product(module, a, z)))
            a = z
    for module in list(model)[first:]:
        a = module(a)
    loss = nn.functional.cross_entropy(a, labels)
    for parameter in model.parameters():
        parameter.grad = None
    parameters = list(nn.Sequential(*list(model)[first:]).parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()
    with torch.no_grad():
        for weight, update in updates:
            weight.copy_(local_step(weight, update, eta, sign))
