"""Which step a run takes: chosen once, by time, recorded, and kept for good."""

import re

import pytest
import torch

from lowcal import LowcalError
from lowcal.steps import compiled, graphed
from lowcal.steps.modes import candidates
from lowcal.training import step_builder
from lowcal.training.step_builder import fastest

from ..steps.software_graphs import SoftwareGraphs
from ..support import same
from .runs import log, make_run, run_on, state


def chosen(modes, seconds):
    return list(fastest(modes, seconds))[-1]


def test_the_fastest_is_chosen_but_not_for_noise():
    assert chosen(("a", "b", "c"), {"a": 1.0, "b": 0.99, "c": 0.98}.__getitem__) == "a"
    assert chosen(("a", "b", "c"), {"a": 1.0, "b": 0.7, "c": 0.69}.__getitem__) == "b"
    assert chosen(("a", "b", "c"), {"a": 1.0, "b": 0.7, "c": 0.5}.__getitem__) == "c"
    times = {"a": 1.0, "b": 2.0}
    assert fastest(("a", "b"), times.__getitem__) == times


def test_a_mode_that_does_not_apply_is_left_out():
    def seconds(mode):
        if mode == "b":
            raise LowcalError("no")
        return {"a": 1.0, "c": 0.5}[mode]

    assert list(fastest(("a", "b", "c"), seconds)) == ["a", "c"]
    with pytest.raises(LowcalError):
        fastest(("b", "a"), seconds)

    def crowded(mode):
        if mode == "b":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"a": 1.0, "c": 0.5}[mode]

    assert list(fastest(("a", "b", "c"), crowded)) == ["a", "c"]
    with pytest.raises(KeyError):
        fastest(("a", "d"), crowded)


def test_candidates():
    assert candidates(torch.device("cpu")) == ("eager",)
    assert candidates(torch.device("cuda", 1)) == ("eager", "graphed")


@pytest.fixture
def all_modes(monkeypatch):
    """All modes apply; the one named in the list is the fastest."""
    monkeypatch.setattr(graphed, "GRAPHS", SoftwareGraphs)
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(step_builder, "candidates", lambda device: ("eager", "compiled", "graphed"))
    monkeypatch.setattr(step_builder, "_chosen", {})
    monkeypatch.setattr(step_builder, "TRIAL_SECONDS", 0.0)
    winner = ["graphed"]

    def choose(names, seconds):
        return fastest(names, lambda name: seconds(name) * (0.0 if name == winner[0] else 1.0) + (name != winner[0]))

    monkeypatch.setattr(step_builder, "fastest", choose)
    return winner


def test_measuring_changes_nothing_and_the_choice_is_recorded(tmp_path, all_modes):
    chosen = make_run(tmp_path / "auto", step="auto", fused=True)
    (note,) = chosen.warm_up()
    assert re.fullmatch(r"step=graphed, chosen in \S+ s by the time of a step: graphed \S+ ms, .*eager \S+ ms.*", note)
    plain = make_run(tmp_path / "eager", step="eager", fused=True)
    assert same(state(chosen), state(plain))
    for method in ("local", "freeze"):  # share the decision
        assert make_run(tmp_path / f"later-{method}", method, step="auto", fused=True).warm_up() == ()
    run_on(chosen), run_on(plain)
    assert {record["step"] for record in log(chosen)} == {"graphed"}
    assert {record["step"] for record in log(plain)} == {"eager"}
    assert same(state(chosen)["model"], state(plain)["model"])


@pytest.mark.parametrize("first", ["graphed", "compiled", "eager"])
def test_a_resumed_run_goes_on_in_its_mode(tmp_path, all_modes, first):
    all_modes[0] = first
    run = make_run(tmp_path / "run", step="auto", fused=True)
    run.warm_up()
    run_on(run, 2)
    all_modes[0] = "graphed" if first != "graphed" else "compiled"
    again = make_run(tmp_path / "run", step="auto", fused=True)
    again.resume()
    again.warm_up()
    run_on(again, 1)
    assert [record["step"] for record in log(again)] == [first] * 3


def test_stochastic_depth_takes_what_is_left(tmp_path, all_modes):
    run = make_run(tmp_path / "run", "stochastic-depth", step="auto", fused=True)
    assert run.warm_up() == ()
    run_on(run, 1)
    assert log(run)[0]["step"] == "eager"


def test_compiling_is_tried_in_long_runs_alone(tmp_path, all_modes, monkeypatch):
    monkeypatch.setattr(step_builder, "candidates", lambda device: ("eager", "graphed"))
    (note,) = make_run(tmp_path / "short", step="auto", fused=True).warm_up()
    assert "compiled" not in note
    monkeypatch.setattr(step_builder, "_chosen", {})
    monkeypatch.setattr(step_builder, "LONG_RUN", 0.0)
    (note,) = make_run(tmp_path / "long", step="auto", fused=True).warm_up()
    assert "graphed-compiled" in note


def test_on_the_processor_it_is_the_eager_one(tmp_path):
    run = make_run(tmp_path / "run", step="auto")
    run.warm_up()
    run_on(run, 1)
    assert log(run)[0]["step"] == "eager"


def test_a_checkpoint_of_a_mode_that_does_not_apply_here_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as there:
        there.setattr(graphed, "GRAPHS", SoftwareGraphs)
        run_on(make_run(tmp_path / "run", step="graphed", fused=True), 1)
    again = make_run(tmp_path / "run", step="auto", fused=True)
    before = state(again)
    with pytest.raises(LowcalError, match=r"does not fit this run .* needs a CUDA device"):
        again.resume()
    assert same(before, state(again))
