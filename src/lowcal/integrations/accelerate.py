"""LoCal with Accelerate: what to call instead of ``accelerator.prepare`` for the network and its optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lowcal.errors import LowcalError
from lowcal.integrations.versions import check_host
from lowcal.local import LoCal
from lowcal.parallel import DistributedLoCal

check_host("accelerate", "1.0")

from accelerate import Accelerator  # noqa: E402  (after the check)
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.utils import send_to_device  # noqa: E402


def prepare_local(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    epochs: int,
    **options: Any,
) -> tuple[nn.Module, Any, LoCal]:
    """Prepares a network and its optimizers for training with `LoCal`; prepare data loaders and schedulers as usual.

    With several processes the network is wrapped in `DistributedLoCal` instead of DDP, so that each rule works, and
    moves need nothing more. ``accelerator.save_state`` and ``load_state`` include the controller's state.

    Args:
        accelerator: as usual.
        model: the network, not prepared.
        optimizer: the optimizer that holds its parameters, or a list of several, not prepared.
        epochs: as for `LoCal`.
        options: further arguments of `LoCal`. ``example_inputs`` may be on any device.

    Returns:
        The prepared network, the prepared optimizer (a list, if several were given), and the controller. Call its
        ``end_epoch`` with the epoch's mean loss on each process.

    Raises:
        LowcalError: Accelerate is missing or too old; the network or an optimizer is prepared already; parameters are
            sharded; an option of Accelerate is not supported; or `LoCal` refuses an argument.

    Example:
        >>> model, optimizer, local = prepare_local(accelerator, model, optimizer, epochs=90)  # doctest: +SKIP
    """
    several = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    if getattr(model, "_is_accelerate_prepared", False) or any(isinstance(o, AcceleratedOptimizer) for o in several):
        raise LowcalError(
            "prepare_local: the model or the optimizer is prepared already; call prepare_local instead of "
            "accelerator.prepare for these two"
        )
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise LowcalError(
            f"prepare_local: {kind} does not keep parameters whole on each device; use Accelerate with plain data "
            "parallelism (DDP) or one device"
        )
    ddp_options = _ddp_options(accelerator) if accelerator.num_processes > 1 else None
    if accelerator.device_placement:
        model.to(accelerator.device)
    example = options.pop("example_inputs", None)
    if example is not None:
        example = send_to_device(example, accelerator.device)
    local = LoCal(model, several, epochs=epochs, example_inputs=example, **options)
    prepared = accelerator.prepare_model(model, evaluation_mode=True)  # without DDP, for training all the same
    if ddp_options is not None:
        prepared = DistributedLoCal(model, local, **ddp_options)
    optimizers = [accelerator.prepare_optimizer(each) for each in several]
    accelerator.register_for_checkpointing(local)
    return prepared, optimizers if isinstance(optimizer, Sequence) else optimizers[0], local


def _ddp_options(accelerator: Accelerator) -> dict[str, Any]:
    """The arguments that Accelerate would give DDP."""
    plugin, handler = accelerator.state.dynamo_plugin, accelerator.ddp_handler
    if plugin.backend.value != "NO":
        raise LowcalError(
            "prepare_local: dynamo_backend is not supported with several processes; leave it out, and compile the "
            "network's blocks in place: block.compile()"
        )
    options: dict[str, Any] = {}
    if handler is not None:
        if handler.comm_hook.value != "no":
            raise LowcalError(
                f"prepare_local: comm_hook is {handler.comm_hook.value!r}, which DistributedLoCal does not support; "
                "leave it out of DistributedDataParallelKwargs"
            )
        options = handler.to_kwargs()
    if accelerator.device.type != "cpu":
        options["device_ids"] = [accelerator.local_process_index]
    return options
