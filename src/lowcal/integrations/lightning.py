"""LoCal in Lightning: a callback of the Trainer."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowcal.errors import LowcalError, nearest
from lowcal.integrations.versions import check_host
from lowcal.local import LoCal
from lowcal.rules import Hebbian, Rule
from lowcal.schedule import NormTrend, Schedule
from lowcal.supervision import LossTrend, Supervision

check_host("lightning", "2.5")

import lightning.pytorch as pl  # noqa: E402  (after the check)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy  # noqa: E402


class LoCalCallback(pl.Callback):  # type: ignore[misc, unused-ignore]
    """Trains the network of a LightningModule with `LoCal`; the module stays as it is.

    `LoCal` is built when fitting starts, with ``trainer.max_epochs``. Each epoch ends with the mean of the losses that
    ``training_step`` returned. ``lowcal/boundary``, ``lowcal/sign`` and ``lowcal/change`` (||dW_E|| of the transition
    layer) of each epoch go to the Trainer's loggers. The Trainer's checkpoints hold the whole state, also in the middle
    of an epoch.

    Args:
        network: name of the submodule that learns under `LoCal`. None: the only child that has parameters; if there
            are several, the LightningModule itself, whose ``training_step`` then calls ``self(inputs)``.
        optimizer: the position, or several positions, in ``trainer.optimizers`` of those that hold its parameters.
        rule: as for `LoCal`. On several devices `Frozen` alone.
        schedule: as for `LoCal`.
        supervision: as for `LoCal`.
        norm_stats: as for `LoCal`.
        example_inputs: as for `LoCal`, on any device.

    Attributes:
        local: the controller, from the start of fitting on.

    Raises:
        LowcalError: Lightning is missing or too old. When fitting starts: the callback was used before; the Trainer has
            no ``max_epochs``, or a strategy that shards parameters; or `LoCal` refuses an argument.

    Example:
        >>> trainer = pl.Trainer(max_epochs=90, callbacks=[LoCalCallback()])  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        network: str | None = None,
        optimizer: int | Sequence[int] = 0,
        rule: Rule = Hebbian(),  # noqa: B008  (immutable)
        schedule: Schedule = NormTrend(),  # noqa: B008
        supervision: Supervision | None = LossTrend(),  # noqa: B008
        norm_stats: Literal["batch", "running"] = "batch",
        example_inputs: Any = None,
    ) -> None:
        self.local: LoCal | None = None
        self._network = network
        self._positions = [optimizer] if isinstance(optimizer, int) else list(optimizer)
        self._rule, self._example_inputs = rule, example_inputs
        self._options: dict[str, Any] = {
            "rule": rule,
            "schedule": schedule,
            "supervision": supervision,
            "norm_stats": norm_stats,
        }
        self._saved: dict[str, Any] | None = None
        self._loss: Tensor | None = None  # the sum of this epoch's losses, on the device
        self._batches = 0

    # State

    @property
    def state_key(self) -> str:
        """The key of this callback's state in checkpoints, one for each network."""
        return self._generate_state_key(network=self._network)

    def state_dict(self) -> dict[str, Any]:
        """The controller's state and the running mean of the loss."""
        if self.local is None:
            return self._saved or {}
        loss = None if self._loss is None else float(self._loss)
        return {"local": self.local.state_dict(), "loss": loss, "batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until fitting starts."""
        self._saved = state_dict

    # The run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks the Trainer before anything is built."""
        if stage != "fit":
            return
        if not isinstance(trainer, pl.Trainer):
            raise LowcalError(
                f"LoCalCallback: the Trainer comes from {type(trainer).__module__}; take lightning.pytorch.Trainer"
            )
        if self.local is not None:
            raise LowcalError(
                "LoCalCallback: this callback has trained a network already; give each Trainer, and each call of fit, "
                "a callback of its own"
            )
        if not (isinstance(trainer.max_epochs, int) and trainer.max_epochs > 0):
            raise LowcalError(
                f"LoCalCallback: the Trainer's max_epochs is {trainer.max_epochs}, on which the schedule depends; "
                "give Trainer(max_epochs=...) the number of epochs of the whole training"
            )
        self._options["epochs"] = trainer.max_epochs
        if not isinstance(trainer.strategy, (DDPStrategy, SingleDeviceStrategy)):
            raise LowcalError(
                f"LoCalCallback: {type(trainer.strategy).__name__} does not keep parameters whole on each device; "
                "give Trainer(strategy='ddp') or one device"
            )
        if trainer.world_size > 1 and (self._rule.collects or self._rule.opens):
            raise LowcalError(
                f"LoCalCallback: {self._rule} on {trainer.world_size} devices needs sums that Lightning's DDP does not "
                "make; take rule=lowcal.Frozen(), or lowcal.DistributedLoCal in a loop of your own"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Builds the controller, and loads its state from a checkpoint."""
        optimizers = trainer.optimizers
        for position in self._positions:
            if not 0 <= position < len(optimizers):
                raise LowcalError(
                    f"LoCalCallback: optimizer is {position}, and configure_optimizers returned {len(optimizers)}; "
                    "give a position from 0, or a list of them"
                )
        example = self._example_inputs
        if example is not None:
            example = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(example))
        self.local = LoCal(
            _find(pl_module, self._network),
            [optimizers[position] for position in self._positions],
            example_inputs=example,
            **self._options,
        )
        if self._saved:
            self.local.load_state_dict(self._saved["local"])
            self._batches = self._saved["batches"]
            if self._saved["loss"] is not None:
                self._loss = torch.tensor(self._saved["loss"], device=pl_module.device)
            self._saved = None
        if self.local.boundary:
            _wrap_again(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends an epoch that a checkpoint of its last batch left open."""
        local = self._controller()
        if local.epoch == trainer.current_epoch - 1 and self._batches:
            self._end_epoch(trainer, pl_module)
        if local.epoch != trainer.current_epoch:
            raise LowcalError(
                f"LoCalCallback: the Trainer starts at epoch {trainer.current_epoch} and LoCal at {local.epoch}; "
                "resume from a checkpoint that was saved with this callback"
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the batch's loss to the running mean, without waiting for the device."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if loss is not None:
            # With automatic optimization, Lightning has divided the loss by this number.
            loss = loss.detach().float() * (trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1)
            self._loss = loss if self._loss is None else self._loss + loss
            self._batches += 1
        if trainer.global_step and pl_module.automatic_optimization and not self._controller().layers:
            raise LowcalError(
                "LoCalCallback: training_step did not call the network as a whole; give the name of the submodule that "
                "it calls, such as LoCalCallback(network='net')"
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the epoch of the controller; after a move, wraps the module in DDP again."""
        local = self._controller()
        values = {"lowcal/boundary": float(local.boundary), "lowcal/sign": float(local.sign)}
        self._end_epoch(trainer, pl_module)
        if local.change is not None:
            values["lowcal/change"] = local.change
        pl_module.log_dict(values, rank_zero_only=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the network without hooks."""
        if self.local is not None:
            self.local.detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the network without hooks."""
        if stage == "fit" and self.local is not None:
            self.local.detach()

    def _controller(self) -> LoCal:
        if self.local is None:
            raise LowcalError("LoCalCallback: fitting has not started; call trainer.fit")
        return self.local

    def _end_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._loss is None:
            raise LowcalError(
                "LoCalCallback: training_step returned no loss in this epoch; return it, or {'loss': loss}, with "
                "manual optimization too"
            )
        loss = trainer.strategy.reduce(self._loss / self._batches, reduce_op="mean")
        self._loss, self._batches = None, 0
        if self._controller().end_epoch(loss):
            _wrap_again(trainer, pl_module)


def _find(module: pl.LightningModule, name: str | None) -> nn.Module:
    """The network in `module`: the submodule `name`, or the only child with parameters, or `module` itself."""
    if name is not None:
        try:
            return module.get_submodule(name)
        except AttributeError:
            raise LowcalError(
                f"LoCalCallback: {type(module).__name__} has no submodule '{name}'"
                f"{nearest(name, (child for child, _ in module.named_children()))}"
            ) from None
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    alone = len(children) == 1 and not any(True for _ in module.parameters(recurse=False))
    return children[0] if alone else module


def _wrap_again(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Builds DDP again, which reads ``requires_grad`` only when it is built."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.model = module
        gc.collect()  # the old reducer's hooks on the parameters go with it
        strategy.configure_ddp()
        strategy._pl_static_graph_delay_done = False
