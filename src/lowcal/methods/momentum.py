"""SGD's momentum before its first step."""

from __future__ import annotations

import torch
from torch.optim import SGD, Optimizer


def fill_momentum(optimizer: Optimizer) -> None:
    """Gives parameters that a fused SGD has no momentum for a momentum of zero, with which its first step is the same.

    Its kernel takes the momentum of all parameters or of none, and if it skips the first step, as the gradient scaler
    may ask for, it leaves what it allocated for it unwritten (torch 2.15).
    """
    for group in optimizer.param_groups:
        if isinstance(optimizer, SGD) and group["fused"] and group["momentum"]:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
