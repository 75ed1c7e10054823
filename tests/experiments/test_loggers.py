"""What each logger writes is read back by its own tool's reader, over an interruption too; no test needs a network."""

import csv
import json
import socket
import struct
import sys
import time

import pytest

import lowcal
from lowcal.cli import main
from lowcal.errors import LowcalError
from lowcal.experiments import loggers
from lowcal.experiments.loggers import CSV, LOGGERS, SCALARS, Subject, find_loggers
from lowcal.training.run_folder import RunFolder

from ..commands import interrupted, small


@pytest.fixture(autouse=True)
def _offline(here, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    settings = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "WANDB_MODE": "offline",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_CONFIG_DIR": str(here / "config"),
        "WANDB_CACHE_DIR": str(here / "cache"),
        "WANDB_DATA_DIR": str(here / "data"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # it reads its variables once


def options(*names, methods="sgd,local"):
    return ["compare", *small("epochs=3"), "--methods", methods, "--out", "out", "-q", "--log", ",".join(names)]


def expected(run):
    """The figures of each epoch that are to be in the log of the run in a folder, by their names."""
    records = [json.loads(line) for line in (run / "epochs.jsonl").read_text().splitlines()]
    return {
        name: {record["epoch"] + 1: record[name] for record in records if record[name] is not None} for name in SCALARS
    }


def approximately(figures):
    """The same in single precision, as TensorBoard stores them; without the names that have no figures."""
    return {name: pytest.approx(values, rel=1e-6) for name, values in figures.items() if values}


def in_tensorboard(folder):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder / "logs"), {"scalars": 0}).Reload()
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    for points in scalars.values():
        assert len({point.step for point in points}) == len(points)  # no epoch is there twice
    return {name: {point.step: point.value for point in points} for name, points in scalars.items()}, events


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def in_csv(folder):
    rows = rows_of(folder / "logs" / "scalars.csv")
    assert [int(row["epoch"]) for row in rows] == list(range(1, len(rows) + 1))
    return {name: {int(row["epoch"]): float(row[name]) for row in rows if row[name]} for name in SCALARS}


def in_mlflow(out):
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{(out / 'logs' / 'mlflow.db').resolve()}")
    experiment = client.get_experiment_by_name("lowcal")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    return client, runs


def mlflow_figures(client, run):
    figures = {}
    for name in run.data.metrics:
        points = client.get_metric_history(run.info.run_id, name)
        figures[name] = {point.step: point.value for point in points}
        assert len(figures[name]) == len(points)
    return figures


def in_wandb(out, name):
    """The records of a run's offline files, each file's apart: blocks of 32 KiB as in a log of LevelDB."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    found = []
    for path in sorted((out / "logs" / "wandb").glob("offline-run-*/*.wandb")):
        data, at, records, whole = path.read_bytes(), 7, [], b""
        while at + 7 <= len(data):
            left = 32768 - at % 32768
            if left < 7:
                at += left
                continue
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            whole = (b"" if kind in (1, 2) else whole) + data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                records.append(messages.Record.FromString(whole))
        if any(record.run.display_name == name for record in records):
            found.append(records)
    return found


def wandb_figures(files):
    figures = {}
    for record in (record for records in files for record in records if record.HasField("history")):
        items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name in set(items) & set(SCALARS):
            assert items["_step"] not in figures.setdefault(name, {})
            figures[name][items["_step"]] = items[name]
    return figures


def test_tensorboard(here, capsys):
    pytest.importorskip("tensorboard")
    assert main(options("tensorboard")) == 0
    for method in ("sgd", "local"):
        found, events = in_tensorboard(here / "out" / f"{method}-seed0")
        assert found == approximately(expected(here / "out" / f"{method}-seed0"))
        settings = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        assert b"optimizer.lr" in settings
    _, events = in_tensorboard(here / "out")
    (text,) = events.Tensors("results/text_summary")
    assert "| sgd |" in text.tensor_proto.string_val[0].decode()


def test_csv(here):
    assert main(options("csv")) == 0
    run = here / "out" / "local-seed0"
    assert in_csv(run) == expected(run)
    settings = {row["setting"]: row["value"] for row in rows_of(run / "logs" / "settings.csv")}
    assert (settings["method"], settings["epochs"], settings["model.name"]) == ("local", "3", "resnet8")
    assert (here / "out" / "logs" / "results.csv").read_bytes() == (here / "out" / "summary.csv").read_bytes()


def test_all_four_over_an_interruption(here, monkeypatch, capsys):
    names = ("tensorboard", "csv", "mlflow", "wandb")
    for name in ("tensorboard", "mlflow", "wandb"):
        pytest.importorskip(name)
    assert interrupted(options(*names), 3, monkeypatch) == 130  # local has finished 2 epochs, sgd 1
    _, runs = in_mlflow(here / "out")
    assert {run.info.status for run in runs.values()} == {"KILLED"}
    assert main(options(*names)) == 0
    assert capsys.readouterr().err.count("\n") == 1  # how to continue
    client, runs = in_mlflow(here / "out")
    assert set(runs) == {"sgd-seed0", "local-seed0", "out"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for method in ("sgd", "local"):
        name = f"{method}-seed0"
        wanted = expected(here / "out" / name)
        assert in_csv(here / "out" / name) == wanted
        assert in_tensorboard(here / "out" / name)[0] == approximately(wanted)
        assert mlflow_figures(client, runs[name]) == approximately(wanted)
        files = in_wandb(here / "out", name)
        assert wandb_figures(files) == approximately(wanted)
        assert len({record.run.run_id for records in files for record in records if record.run.run_id}) == 1
        assert runs[name].data.params["optimizer.lr"] == "0.05"
        assert runs[name].data.tags["group"] == "out"
    assert {file.path for file in client.list_artifacts(runs["out"].info.run_id)} == {
        "results.md", "results.csv", "report.html",
    }  # fmt: skip
    (records,) = in_wandb(here / "out", "out")
    assert "report" in {record.artifact.type for record in records}
    assert "results" in {item.nested_key[0] for record in records for item in record.history.item if item.nested_key}


def test_one_run_and_more_epochs_of_it(here):
    folder = here / "one"
    first = lowcal.train("digits", "local", settings=small()[1::2], out=folder, log="csv", quiet=True)
    assert in_csv(folder) == expected(folder)
    (row,) = rows_of(folder / "logs" / "results.csv")
    assert float(row["top1_error"]) == first.table[0]["top1_error"]
    lowcal.train(out=folder, resume=True, extend=True, settings={"epochs": 3}, log=["csv"], quiet=True)
    assert in_csv(folder) == expected(folder)
    assert len(expected(folder)["seconds"]) == 3


@pytest.mark.parametrize("name", ["tensorboard", "csv"])
def test_epochs_that_a_run_takes_again_replace_those_in_the_log(name, here):
    pytest.importorskip(name)
    read = {"tensorboard": lambda folder: in_tensorboard(folder)[0], "csv": in_csv}[name]
    folder = here / "run"
    (folder / "logs").mkdir(parents=True)

    def log(epochs, first, last, loss):
        logger = LOGGERS[name](Subject("run", "", folder / "logs", folder / "logs", {"epochs": 3}, epochs))
        assert logger.logged == first - 1
        for epoch in range(first, last + 1):
            logger.scalars(epoch, {"train_loss": loss})
        logger.close(finished=False)

    log(0, 1, 3, 4.0)
    log(1, 2, 2, 0.5)
    assert read(folder)["train_loss"] == {1: 4.0, 2: 0.5}


def test_a_run_that_is_replaced_leaves_no_log(here):
    lowcal.train("digits", "sgd", settings=small()[1::2], out="run", log="csv", quiet=True)
    RunFolder(here / "run").clear()
    assert not (here / "run" / "logs").exists()


def closed_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_an_unreachable_server_is_told_once_and_the_runs_continue(name, here, monkeypatch, capsys):
    pytest.importorskip(name)
    monkeypatch.setattr(loggers, "_PATIENCE", 2)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", "online")
    start = time.monotonic()
    assert main(options(name, "csv")) == 0
    assert time.monotonic() - start < 15
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lowcal: ")]
    assert line.startswith(f"lowcal: {name}: ")
    assert line.endswith("; the run continues without this log")
    for method in ("sgd", "local"):
        assert in_csv(here / "out" / f"{method}-seed0") == expected(here / "out" / f"{method}-seed0")


def test_a_logger_that_raises_later_is_told_once(here, monkeypatch, capsys):
    class Failing(CSV):
        def scalars(self, epoch, values):
            if epoch == 2:
                raise ConnectionError("no answer\nfrom the server")
            super().scalars(epoch, values)

        def close(self, *, finished):
            raise ConnectionError("still none")

    monkeypatch.setitem(LOGGERS, "csv", Failing)
    assert main(options("csv")) == 0
    assert capsys.readouterr().err == "lowcal: csv: no answer; the run continues without this log\n"
    assert in_csv(here / "out" / "local-seed0")["boundary"] == {1: 0.0}


def test_wrong_names_and_missing_packages_are_told_before_the_run(here, monkeypatch, capsys):
    with pytest.raises(LowcalError, match="unknown 'tensorbord'; did you mean 'tensorboard'"):
        find_loggers("csv, tensorbord")
    assert list(find_loggers("csv, csv")) == ["csv"]
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    for command in ("compare", "train"):
        assert main([command, *small(), "--out", "out", "--log", "csv,mlflow"]) == 2
        message = "lowcal: mlflow is not installed, which --log mlflow needs; pip install 'lowcal[mlflow]'\n"
        assert capsys.readouterr().err == message
    assert not (here / "out").exists()
