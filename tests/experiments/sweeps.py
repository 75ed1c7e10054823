"""Small sweeps: a plan of short runs, the study that it leaves, and workers that stop."""

import optuna
import torch

from lowcal.experiments.recipe_text import load_recipe
from lowcal.experiments.sweep import Sweep, sweep
from lowcal.training.run import Run

CPU = torch.device("cpu")
SMALL = [
    "epochs=1",
    "batch=16",
    "model.width=4",
    "data={name: synthetic, train_images: 40, test_images: 16, image_size: 8, classes: 2}",
    "local.schedule.interval=1",
]
TWO = ("local.lr=0.1,0.2",)  # the shortest search


class Diary:
    """A watcher that writes down the notes and the epochs."""

    def __init__(self):
        self.notes, self.epochs = [], []

    def note(self, text):
        self.notes.append(text)

    def stage(self, text, done=0, total=0):
        pass

    def begin(self, arms, finished, epochs, *, later=0):
        pass

    def step(self, arm, progress):
        pass

    def epoch(self, arm, record):
        self.epochs.append((arm.folder, record["epoch"]))


def plan(*searches, settings=(), **options):
    return Sweep(
        load_recipe("digits"), options.pop("method", "local"), searches, settings=[*SMALL, *settings], **options
    )


def run(made, out, diary=None):
    return sweep(made, out, data_dir=None, device=CPU, watcher=diary or Diary())


def study_of(out):
    return optuna.load_study(study_name="digits-local", storage=f"sqlite:///{out}/sweep.db")


def states(out):
    return [trial.state.name for trial in study_of(out).trials]


def stop_after(monkeypatch, epochs, error=KeyboardInterrupt):
    """Lets the runs train for so many epochs, then raises `error`; returns what undoes it."""
    whole, left = Run.run_epoch, [epochs]

    def run_epoch(run, progress=None):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return whole(run, progress)

    monkeypatch.setattr(Run, "run_epoch", run_epoch)
    return lambda: monkeypatch.setattr(Run, "run_epoch", whole)
