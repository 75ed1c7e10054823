"""Logs of runs in other tools: TensorBoard, CSV, MLflow, and Weights & Biases.

Each tool is used by its own client, which is imported when its log is opened.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from lowcal.errors import LowcalError, nearest
from lowcal.files import FORMAT, atomic_write, read_json, write_json
from lowcal.report.table import Table

# The fields of `epochs.jsonl` that are logged; one that is null is left out.
SCALARS = (
    "train_loss", "test_loss", "top1_error", "lr", "local_lr", "boundary", "sign", "transition_change", "seconds",
    "step_ms", "peak_memory_bytes",
)  # fmt: skip
_PROJECT = "lowcal"  # of Weights & Biases, and MLflow's experiment, unless their own variables say otherwise
_PATIENCE = 20  # seconds until a server that does not answer is given up


@dataclass(frozen=True)
class Subject:
    """What a log is of.

    Attributes:
        name: of the run or of the comparison.
        group: the comparison of the run; "" for none.
        folder: holds the files of this log.
        store: holds the files that all logs of a comparison share.
        settings: the recipe's settings by their keys; empty for a comparison.
        epochs: finished epochs of the run.
    """

    name: str
    group: str
    folder: Path
    store: Path
    settings: Mapping[str, bool | int | float | str]
    epochs: int


class Logger(Protocol):
    """The log of one run, or of a comparison, which has no epochs; one that exists is continued.

    Attributes:
        logged: the last epoch in the log, counted from 1; 0 for none.
    """

    logged: int

    def __init__(self, subject: Subject) -> None: ...

    def scalars(self, epoch: int, values: Mapping[str, float]) -> None:
        """Log the figures of an epoch, counted from 1."""

    def table(self, table: Table) -> None:
        """Log the table of the results."""

    def artefact(self, path: Path) -> None:
        """Log a file, where the tool stores files."""

    def close(self, *, finished: bool) -> None:
        """End the log; `finished` says whether the run is."""


class TensorBoard:
    """Event files in the folder; the settings are in the HParams tab, the table is in the Text tab."""

    def __init__(self, subject: Subject) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        is_new = not any(subject.folder.glob("events.out.tfevents.*"))
        self.logged = 0 if is_new else min(self._last_epoch(subject.folder), subject.epochs)
        self._writer = SummaryWriter(str(subject.folder), purge_step=self.logged + 1)
        if is_new and subject.settings:
            for summary in hparams(dict(subject.settings), dict.fromkeys(("top1_error", "seconds"))):
                self._writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]  # annotated as None

    @staticmethod
    def _last_epoch(folder: Path) -> int:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
        has_epochs = "train_loss" in events.Tags()["scalars"]
        return events.Scalars("train_loss")[-1].step if has_epochs else 0

    def scalars(self, epoch: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def table(self, table: Table) -> None:
        """See `Logger`."""
        self._writer.add_text("results", table.markdown())

    def artefact(self, path: Path) -> None:
        """TensorBoard stores no files."""

    def close(self, *, finished: bool) -> None:
        """See `Logger`."""
        self._writer.close()


class CSV:
    """The files scalars.csv, settings.csv and results.csv in the folder."""

    def __init__(self, subject: Subject) -> None:
        self._folder = subject.folder
        self._rows: list[dict[str, Any]] = []
        if (subject.folder / "scalars.csv").exists():
            text = (subject.folder / "scalars.csv").read_text(encoding="utf-8")
            self._rows = list(csv.DictReader(io.StringIO(text)))[: subject.epochs]
        self.logged = len(self._rows)
        if subject.settings:
            settings = [{"setting": name, "value": value} for name, value in subject.settings.items()]
            self._write("settings.csv", settings, ("setting", "value"))

    def scalars(self, epoch: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        self._rows.append({"epoch": epoch, **values})
        self._write("scalars.csv", self._rows, ("epoch", *SCALARS))

    def _write(self, name: str, rows: Iterable[Mapping[str, Any]], fields: Sequence[str]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write(self._folder / name, text.getvalue().encode())

    def table(self, table: Table) -> None:
        """See `Logger`."""
        table.write(self._folder / "results", ["csv"])

    def artefact(self, path: Path) -> None:
        """The file is on the disk already."""

    def close(self, *, finished: bool) -> None:
        """Every epoch is on the disk already."""


class MLflow:
    """A run of MLflow, on the server of MLFLOW_TRACKING_URI, or in an SQLite database in the store."""

    def __init__(self, subject: Subject) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(_PATIENCE))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("mlflow.store.db").setLevel(logging.WARNING)  # it tells of each new database
        server = os.environ.get("MLFLOW_TRACKING_URI", "")
        self._client = MlflowClient(server or f"sqlite:///{subject.store.resolve() / 'mlflow.db'}")
        kept = subject.folder / "mlflow.json"
        known = read_json(kept) if kept.exists() else {}
        if known.get("server") == server:
            self._run = known["run"]
            self._client.update_run(self._run, status="RUNNING")
            history = self._client.get_metric_history(self._run, "train_loss")
            self.logged = max((metric.step for metric in history), default=0)
            return
        tags = {"group": subject.group} if subject.group else {}
        self._run = self._client.create_run(
            self._experiment(subject.store), run_name=subject.name, tags=tags
        ).info.run_id
        write_json(kept, {"format": FORMAT, "server": server, "run": self._run})
        self._client.log_batch(self._run, params=[Param(name, str(value)) for name, value in subject.settings.items()])
        self.logged = 0

    def _experiment(self, store: Path) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        is_local = "MLFLOW_TRACKING_URI" not in os.environ
        return self._client.create_experiment(name, (store.resolve() / "mlflow").as_uri() if is_local else None)

    def scalars(self, epoch: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        self._client.log_batch(self._run, [Metric(name, value, now, epoch) for name, value in values.items()])

    def table(self, table: Table) -> None:
        """See `Logger`."""
        self._client.log_text(self._run, table.markdown(), "results.md")
        self._client.log_text(self._run, table.csv(), "results.csv")

    def artefact(self, path: Path) -> None:
        """See `Logger`."""
        self._client.log_artifact(self._run, str(path))

    def close(self, *, finished: bool) -> None:
        """See `Logger`."""
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")


class WandB:
    """A run of Weights & Biases; WANDB_MODE=offline writes it into the store, for `wandb sync`."""

    def __init__(self, subject: Subject) -> None:
        import wandb

        self._kept = subject.folder / "wandb.json"
        known = read_json(self._kept) if self._kept.exists() else {}
        self._id: str = known.get("run") or uuid4().hex[:8]
        self.logged: int = known.get("epochs", 0)
        self._run = wandb.init(
            id=self._id,
            resume="allow",
            reinit="create_new",  # the methods of a comparison train in turn
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            group=subject.group or None,
            name=subject.name,
            dir=os.environ.get("WANDB_DIR", str(subject.store)),
            config=dict(subject.settings),
            settings=wandb.Settings(
                init_timeout=_PATIENCE,
                login_timeout=_PATIENCE,
                finish_timeout=_PATIENCE,
                silent=True,
                console="off",
            ),
        )
        self._keep()

    def _keep(self) -> None:
        write_json(self._kept, {"format": FORMAT, "run": self._id, "epochs": self.logged})

    def scalars(self, epoch: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        self._run.log(dict(values), step=epoch)
        self.logged = epoch
        self._keep()

    def table(self, table: Table) -> None:
        """See `Logger`."""
        import wandb

        names: list[str | int] = [*table.rows[0]]
        self._run.log({"results": wandb.Table(names, [[*row.values()] for row in table.rows])})

    def artefact(self, path: Path) -> None:
        """See `Logger`."""
        import wandb

        artefact = wandb.Artifact(f"{self._id}-{path.stem}", type=path.stem)
        artefact.add_file(str(path))
        self._run.log_artifact(artefact)

    def close(self, *, finished: bool) -> None:
        """See `Logger`."""
        self._run.finish(exit_code=0 if finished else 1)


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "csv": CSV, "mlflow": MLflow, "wandb": WandB}


def find_loggers(names: str | Iterable[str]) -> dict[str, type[Logger]]:
    """The loggers of these names, in a list or in one text with commas.

    Raises:
        LowcalError: one is unknown, or its package is not installed.
    """
    found = {}
    for name in names.replace(" ", "").split(",") if isinstance(names, str) else names:
        if name not in LOGGERS:
            raise LowcalError(f"log: unknown '{name}'{nearest(name, LOGGERS)}")
        if name != "csv" and find_spec(name) is None:
            raise LowcalError(f"{name} is not installed, which --log {name} needs; pip install 'lowcal[{name}]'")
        found[name] = LOGGERS[name]
    return found
