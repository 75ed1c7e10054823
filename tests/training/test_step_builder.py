"""Which step a run takes: chosen once, by time, recorded, and kept for good."""

import re

import pytest
import torch

from lowcal import LowcalError, overlap
from lowcal.steps import compiled, graphed
from lowcal.steps.modes import candidates
from lowcal.training import step_builder
from lowcal.training.step_builder import fastest

from ..steps.software_graphs import LateStream, SoftwareGraphs
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
    monkeypatch.setattr(overlap, "STREAM", LateStream)
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(step_builder, "candidates", lambda device: ("eager", "compiled", "graphed"))
    monkeypatch.setattr(step_builder, "_times", {})
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


@pytest.fixture
def timed(all_modes, monkeypatch):
    """The modes of the trials, and where the copies' boundaries are; a step takes what the dictionary says."""
    monkeypatch.setattr(step_builder, "candidates", lambda device: ("eager", "graphed"))
    monkeypatch.setattr(step_builder, "fastest", fastest)
    seconds, tried = {"eager": 9.0, "graphed": 2.0, "graphed-overlapped": 1.0}, []

    def trial(builder, steps, images=None, *, mode=None, seconds=None, boundary=None, times=seconds):
        if mode is not None:
            tried.append((mode, boundary))
        return times.get(mode)

    monkeypatch.setattr(step_builder.StepBuilder, "try_steps", trial)
    return seconds, tried


def again(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(step_builder, "_times", {})


def test_a_second_stream_is_judged_where_layers_learn_locally(tmp_path, timed):
    _, tried = timed
    for method in ("sgd", "freeze", "refresh"):
        run = make_run(tmp_path / method, method, step="auto", fused=True)
        run.warm_up()
        assert run.state.step_mode == "graphed"
    assert tried == [("eager", None), ("graphed", None)]
    run = make_run(tmp_path / "local", step="auto", fused=True)
    (note,) = run.warm_up()
    assert tried[2:] == [("graphed", 2), ("graphed-overlapped", 2)]  # the run moves to 1 and to 4
    assert re.fullmatch(
        r"step=graphed-overlapped, chosen in \S+ s by the time of a step at boundary 2: "
        r"graphed-overlapped 1e\+03 ms, graphed 2e\+03 ms",
        note,
    )
    assert make_run(tmp_path / "other", step="auto", fused=True).warm_up() == ()
    run_on(run)
    assert {record["step"] for record in log(run)} == {"graphed-overlapped"}


def test_a_second_stream_must_be_clearly_faster(tmp_path, timed, monkeypatch):
    timed[0]["graphed-overlapped"] = 1.99
    (note,) = make_run(tmp_path / "run", step="auto", fused=True).warm_up()
    assert re.search("step=graphed, .*; step=graphed, chosen in .* at boundary 2: ", note)
    timed[0]["graphed"], timed[1][:] = 9.0, []
    again(monkeypatch)
    run = make_run(tmp_path / "b" / "run", step="auto", fused=True)
    run.warm_up()
    assert run.state.step_mode == "eager"
    assert len(timed[1]) == 2


def test_the_choice_is_kept_for_later_processes(tmp_path, timed, monkeypatch):
    for method in ("sgd", "local"):
        make_run(tmp_path / method, method, step="auto", fused=True).warm_up()
    timed[1].clear()
    for path in (tmp_path / "later", tmp_path / "local"):  # another arm; one that had finished nothing
        again(monkeypatch)
        run = make_run(path, step="auto", fused=True)
        (note,) = run.warm_up()
        assert run.state.step_mode == "graphed-overlapped"
        assert note == (
            f"step=graphed, as measured before for {tmp_path}: graphed 2e+03 ms, eager 9e+03 ms; "
            f"step=graphed-overlapped, as measured before for {tmp_path} at boundary 2: "
            "graphed-overlapped 1e+03 ms, graphed 2e+03 ms"
        )
    assert timed[1] == []
    again(monkeypatch)
    make_run(tmp_path / "half", precision="bf16", step="auto", fused=True).warm_up()
    assert timed[1]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b'{"format": 1}',
        b'{"format": 1, "choices": [2]}',
        b'{"format": 1, "choices": {"a": 1}}',
        b'{"choices": {}}',
        None,
    ],
)
def test_a_choice_that_cannot_be_read_is_measured_again(tmp_path, timed, monkeypatch, content):
    make_run(tmp_path / "one", "sgd", step="auto", fused=True).warm_up()
    kept = tmp_path / "one" / "step.json"
    if content is None:
        content = kept.read_bytes().replace(b'"graphed"', b'"other"')
        assert content != kept.read_bytes()
    kept.write_bytes(content)
    timed[1].clear()
    again(monkeypatch)
    run = make_run(tmp_path / "two", "sgd", step="auto", fused=True)
    run.warm_up()
    assert (run.state.step_mode, len(timed[1])) == ("graphed", 2)
    assert (tmp_path / "two" / "step.json").read_bytes() != content


def test_a_run_without_a_choice_to_make_keeps_none(tmp_path):
    make_run(tmp_path / "run", step="auto", fused=True).warm_up()
    assert not (tmp_path / "run" / "step.json").exists()


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
    monkeypatch.setattr(step_builder, "LONG_RUN", 0.0)
    (note,) = make_run(tmp_path / "long", "sgd", step="auto", fused=True).warm_up()
    assert re.fullmatch(r"step=graphed, chosen in .*: graphed .*, graphed-compiled .*", note)


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
