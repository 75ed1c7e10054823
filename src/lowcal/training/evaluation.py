"""The loss and the error of a network on images that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowcal.steps.step import autocast


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    precision: str,
    add_up: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> tuple[float, float]:
    """Mean cross entropy and top-1 error, in percent, of `model` over all images of `batches`.

    The network is left in evaluation mode and otherwise unchanged. The device is read once.

    Args:
        model: the network, which returns class scores (N, classes).
        batches: images (N, C, H, W) and class numbers (N,), on the device; N may differ.
        device: the device of the network.
        precision: of the forward pass.
        add_up: adds the sums over these images, (3,) float64 on the device, to those of the other processes.
    """
    model.eval()
    count = 0
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # of the losses, of the right answers
    for images, labels in batches:
        # Not inference_mode: what a network caches in this pass could not be used in training.
        with torch.no_grad(), autocast(device, precision):
            scores = model(images).float()
            loss = F.cross_entropy(scores, labels, reduction="sum")
            right = (scores.argmax(dim=1) == labels).sum()
            sums += torch.stack((loss.double(), right.double()))
        count += len(labels)
    counts = torch.full((1,), count, dtype=torch.float64, device=device)
    loss_sum, right_sum, images_sum = add_up(torch.cat((sums, counts))).tolist()
    return loss_sum / images_sum, 100.0 * (1.0 - right_sum / images_sum)
