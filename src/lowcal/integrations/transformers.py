"""LoCal in the Trainer of transformers: a callback."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowcal.errors import LowcalError
from lowcal.files import DamagedError, load_checked, save_checked
from lowcal.integrations.versions import check_host
from lowcal.local import LoCal
from lowcal.parallel import follow_ddp
from lowcal.rules import Hebbian, Rule
from lowcal.schedule import NormTrend, Schedule
from lowcal.supervision import LossTrend, Supervision

check_host("transformers", "5.0")

from accelerate.state import GradientState  # noqa: E402  (after the check)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402
from transformers.training_args import ParallelMode  # noqa: E402

FILE = "lowcal.pt"  # in each checkpoint folder


class LoCalTrainerCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Trains the Trainer's model with `LoCal`, on one device or on one in each of several processes (DDP).

    `LoCal` is built when training starts. An epoch ends with the mean of the losses that the model returned in it.
    ``lowcal/boundary``, ``lowcal/sign`` and ``lowcal/change`` (||dW_E|| of the transition layer) of each epoch go to
    the Trainer's ``log_history``. Each checkpoint folder gets a file ``lowcal.pt``, from which
    ``resume_from_checkpoint`` goes on exactly.

    Args:
        rule: as for `LoCal`.
        schedule: as for `LoCal`.
        supervision: as for `LoCal`.
        norm_stats: as for `LoCal`.

    Attributes:
        local: the controller, from the start of training on.

    Raises:
        LowcalError: transformers is missing or too old. When training starts: the callback was used before; a feature
            of the Trainer is used that is not supported; the checkpoint to resume from has no state of this callback;
            or `LoCal` refuses an argument.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[LoCalTrainerCallback()])  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        rule: Rule = Hebbian(),  # noqa: B008  (immutable)
        schedule: Schedule = NormTrend(),  # noqa: B008
        supervision: Supervision | None = LossTrend(),  # noqa: B008
        norm_stats: Literal["batch", "running"] = "batch",
    ) -> None:
        self.local: LoCal | None = None
        self._options: dict[str, Any] = {
            "rule": rule,
            "schedule": schedule,
            "supervision": supervision,
            "norm_stats": norm_stats,
        }
        self._handles: list[RemovableHandle] = []
        self._loss: Tensor | None = None  # the sum of this epoch's losses, on the device
        self._passes = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Builds the controller, and loads its state when training resumes."""
        if self.local is not None:
            raise LowcalError(
                "LoCalTrainerCallback: this callback has trained a network already; give each call of train a callback "
                "of its own"
            )
        _check_trainer(args, state, model)
        local = LoCal(model, optimizer, epochs=state.num_train_epochs, **self._options)
        if state.global_step:
            try:
                self._load(_folder(args, state), model, local)
            except LowcalError:
                local.detach()
                raise
        self.local = local
        self._handles = [model.register_forward_hook(self._add_loss)]
        if args.world_size > 1:
            self._handles += follow_ddp(local, lambda: GradientState().sync_gradients)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends an epoch that a checkpoint of its last step left open."""
        if self._controller().epoch == math.floor(state.epoch or 0.0) - 1 and self._passes:
            self._end_epoch(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the epoch of the controller, unless training stops in the middle of it."""
        if not control.should_training_stop or (state.epoch or 0.0) >= self._controller().epoch + 1:
            self._end_epoch(state)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Adds the controller's state to the checkpoint."""
        saved = {
            "local": self._controller().state_dict(),
            "loss": None if self._loss is None else self._mean(float(self._loss)),
            "passes": self._passes,
            "sum": _sum(model),
        }
        if state.is_world_process_zero:
            save_checked(_folder(args, state) / FILE, "trainer", saved)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the network without hooks."""
        self._controller().detach()
        for handle in self._handles:
            handle.remove()

    def _load(self, folder: Path, model: nn.Module, local: LoCal) -> None:
        try:
            saved = load_checked(folder / FILE, "trainer")
        except DamagedError as error:
            raise LowcalError(
                f"{folder / FILE} {error}; resume from a checkpoint in output_dir that was saved with this callback"
            ) from None
        if not math.isclose(saved["sum"], _sum(model), rel_tol=1e-9):
            raise LowcalError(
                f"{folder / FILE} belongs to other weights than those that were loaded; copy the whole checkpoint "
                "folder to output_dir before you resume from it, or take another version of transformers if this one "
                "warns of missing keys"
            )
        local.load_state_dict(saved["local"])
        self._passes = saved["passes"]
        if saved["loss"] is not None:
            self._loss = torch.tensor(saved["loss"], device=next(model.parameters()).device)

    def _add_loss(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        """Adds the loss of a training pass to the running mean, without waiting for the device."""
        if not (model.training and torch.is_grad_enabled()):
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        if loss is None:
            raise LowcalError(
                "LoCalTrainerCallback: the model returned no loss in training; give it labels, and leave "
                "label_smoothing_factor and compute_loss_func out"
            )
        loss = loss.detach().float()
        self._loss = loss if self._loss is None else self._loss + loss
        self._passes += 1

    def _mean(self, loss: float) -> float:
        """The mean over the processes."""
        exchange = self._controller()._local_layers.exchange
        return loss if exchange is None else exchange.mean(loss)[0]

    def _controller(self) -> LoCal:
        if self.local is None:
            raise LowcalError(
                "LoCalTrainerCallback: training has begun without this callback; give it to the Trainer before train()"
            )
        return self.local

    def _end_epoch(self, state: TrainerState) -> None:
        local = self._controller()
        values: dict[str, Any] = {"lowcal/boundary": local.boundary, "lowcal/sign": local.sign}
        if self._loss is None:
            raise LowcalError("LoCalTrainerCallback: no training pass in this epoch; give the Trainer training data")
        loss, self._loss, self._passes = self._loss / self._passes, None, 0
        local.end_epoch(loss)
        values |= {"lowcal/change": local.change, "epoch": state.epoch, "step": state.global_step}
        state.log_history.append(values)


def _check_trainer(args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
    """Checks what the Trainer was asked to do.

    Raises:
        LowcalError: it is not supported.
    """
    for is_used, name in (
        (args.deepspeed, "DeepSpeed"),
        (args.fsdp, "FSDP"),
        (args.n_gpu > 1, f"{args.n_gpu} GPUs in one process"),
        (args.world_size > 1 and args.parallel_mode is not ParallelMode.DISTRIBUTED, args.parallel_mode.value),
    ):
        if is_used:
            raise LowcalError(
                f"LoCalTrainerCallback: the Trainer uses {name}, with which layers cannot stop learning; train on one "
                "device, or with torchrun on one device in each process"
            )
    if args.world_size > 1:
        checkpoints = args.gradient_checkpointing or getattr(model, "is_gradient_checkpointing", False)
        for is_used, name in (
            (args.ddp_find_unused_parameters is False, "ddp_find_unused_parameters=False"),
            (getattr(args, "ddp_static_graph", False), "ddp_static_graph"),  # not in 5.0
            (checkpoints and args.ddp_find_unused_parameters is None, "gradient_checkpointing"),
        ):
            if is_used:
                raise LowcalError(
                    f"LoCalTrainerCallback: {name} keeps the Trainer's DDP from finding layers that stop learning; "
                    "leave it out, or train in one process"
                )
    if args.torch_compile or state.is_hyper_param_search:
        name = "torch_compile" if args.torch_compile else "hyperparameter_search"
        raise LowcalError(f"LoCalTrainerCallback: {name} is not supported; leave it out")
    if state.num_train_epochs >= sys.maxsize:
        raise LowcalError(
            "LoCalTrainerCallback: the number of epochs is not known, on which the schedule depends; give the "
            "Trainer a data set with a length"
        )


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The Trainer's checkpoint folder of this step."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _sum(model: nn.Module) -> float:
    """The sum of all parameters, by which weights are known again. Reads from the device."""
    return sum(float(parameter.detach().cpu().double().sum()) for parameter in model.parameters())
