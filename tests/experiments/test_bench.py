"""The measuring itself: what is recorded, counted and predicted. No test looks at how long something takes."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowcal.cli import main
from lowcal.data import load, make_loader
from lowcal.discovery import trace
from lowcal.experiments.bench.limits import Parts
from lowcal.experiments.bench.run import (
    bench,
    fastest_path,
    flops_speedup,
    known_schedules,
    predicted_speedup,
    step_work,
)
from lowcal.experiments.bench.setup import BenchSettings, BenchSetup
from lowcal.experiments.bench.show import bench_text, targets_text
from lowcal.experiments.bench.timing import Work, summarise, time_in_turn
from lowcal.layers import own_parameters
from lowcal.models import build_model
from lowcal.program import record
from lowcal.schedule import NormTrend, Quadratic
from lowcal.steps import graphed

from ..steps.software_graphs import SoftwareGraphs

CPU = torch.device("cpu")


def freeze(model, images, boundary):
    order = trace(model, images[:1])
    own = own_parameters(order, model)
    for layer in order.layers[:boundary]:
        for parameter in own[layer]:
            parameter.requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "size", "boundaries"),
    [
        ("resnet8", 16, (0, 1, 5, 6, 9)),
        ("mobilenet_v2", 32, (7,)),
        pytest.param("resnet50", 32, (5,), marks=pytest.mark.slow),
        pytest.param("densenet121", 32, (17,), marks=pytest.mark.slow),
        ("efficientnet_b0", 32, (30,)),
    ],
)
def test_replayed_parts_give_what_the_network_gives(name, size, boundaries):
    torch.manual_seed(0)
    base = build_model(name, classes=4).train()
    images = torch.randn(2, 3, size, size)
    for boundary in boundaries:
        model, twin = copy.deepcopy(base), copy.deepcopy(base)
        freeze(model, images, boundary)
        freeze(twin, images, boundary)
        before = copy.deepcopy(twin.state_dict())
        program = record(twin, images)
        twin.load_state_dict(before)
        torch.manual_seed(1)
        wanted = model(images)
        torch.manual_seed(1)
        with torch.no_grad():
            crossing = program.prefix({0: images})
        (found,) = program.suffix(crossing).values()
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        wanted.square().mean().backward()
        found.square().mean().backward()
        for key, parameter in model.named_parameters():
            other = twin.get_parameter(key).grad
            assert (parameter.grad is None) == (other is None), key
            if other is not None:
                torch.testing.assert_close(other, parameter.grad, rtol=0, atol=0)
        for key, buffer in model.named_buffers():
            torch.testing.assert_close(twin.get_buffer(key), buffer, rtol=0, atol=0)


def test_the_prefix_holds_all_that_needs_no_gradient():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    model, images = Counted(), torch.randn(4, 3)
    freeze(model, images, 1)
    program = record(model, images)
    (crossing,) = program.prefix({0: images}).values()
    torch.testing.assert_close(crossing, torch.relu(model.first(images)), rtol=0, atol=0)
    assert not program.suffix.overwrites


def test_a_tensor_that_the_suffix_changes_in_place_is_new_in_each_run():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            out = self.first(x)
            out += self.second(x)
            return out

    torch.manual_seed(0)
    model, images = InPlace(), torch.randn(4, 3)
    labels = torch.zeros(4, dtype=torch.int64)
    wanted = model(images).detach()
    parts = Parts(
        model,
        lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        images,
        labels,
        boundary=1,
        precision="float32",
    )
    assert parts._program.suffix.overwrites
    for _ in range(2):
        parts.suffix.prepare(1)
        parts.suffix.run()
    parts.suffix.prepare(1)
    (found,) = parts._program.suffix(parts._fed.pop()).values()
    torch.testing.assert_close(found.detach(), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("graphs", [None, SoftwareGraphs(CPU)], ids=["eager", "recorded"])
def test_the_suffix_by_itself_is_a_full_step_of_the_layers_behind_the_boundary(graphs):
    torch.manual_seed(0)
    model = build_model("resnet8", classes=4, width=4).train()
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    twin = copy.deepcopy(model)
    freeze(model, images, 5)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.1, momentum=0.9)
    parts = Parts(
        twin,
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        images,
        labels,
        boundary=5,
        precision="float32",
        graphs=graphs,
    )
    for step in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if step or graphs is None:  # before it is recorded, the suffix has run once
            parts.suffix.prepare(1)
            parts.suffix.run()
        parts.prefix.run()
        parts.products.run()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(twin.get_parameter(key), parameter, rtol=0, atol=0)


def test_graphed_steps_are_held_beside_recorded_parts(monkeypatch):
    monkeypatch.setattr(graphed, "GRAPHS", SoftwareGraphs)
    monkeypatch.setattr(SoftwareGraphs, "recorded", 0)
    settings = {"boundaries": (0.5,), "width": 4, "every": 2, "rounds": 1, "warm_up": 1, "runs": 1, "layers": False}
    result = bench(BenchSettings("resnet8", batch=2, image_size=8, step="graphed", **settings), CPU, lambda text: None)
    assert [row["method"] for row in result["rows"]] == ["sgd", "local", "local", "freeze", "local/2"]
    # sgd and local once each; local, freeze and both kinds of step of local/2 before the move and after it (there
    # is one kind before it); three parts.
    assert SoftwareGraphs.recorded == 2 + 2 + 2 + (1 + 2) + 3


def test_steps_can_make_their_mini_batch_as_a_run_does():
    data = load("synthetic", image_size=8, train_images=10, test_images=10)
    loader = make_loader(data, training=True, batch=4, device=CPU)
    made = []
    loader.collate, collate = lambda batch: made.append(batch) or collate(batch), loader.collate
    setup = BenchSetup(
        BenchSettings("resnet8", batch=4, image_size=8, width=2, boundaries=(0.5,), every=1), CPU, loader
    )
    methods = setup.methods().values()
    for timed in methods:
        timed.work().run()
    assert len(made) == len(methods) == 4
    assert all(torch.equal(batch, made[0]) and len(batch) == 4 for batch in made)


def test_works_take_turns_and_whole_periods():
    calls = []
    works = {
        "a": Work(lambda: calls.append("a"), prepare=lambda count: calls.append(f"prepare {count}")),
        "b": Work(lambda: calls.append("b"), period=4),
    }
    times = time_in_turn(works, rounds=2, warm_up=1, runs=2, device=CPU)
    assert calls.count("a") == 3 * 2
    assert calls.count("b") == 3 * 4
    assert calls.count("prepare 2") == 3
    turns = "".join(call for call in calls if len(call) == 1)
    assert turns == "bbbbaa" + "aabbbb" + "bbbbaa"  # each round begins with another one
    assert all(time.q25 <= time.median <= time.q75 for time in times.values())


def test_median_and_quartiles():
    timing = summarise([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (timing.q25, timing.median, timing.q75) == (2.0, 3.0, 4.0)
    assert summarise([7.0]).q25 == 7.0


def test_the_published_schedule_moves_every_k_plus_1_epochs_at_its_fastest():
    # Eq. 2 for 54 layers, blocks of 3, 90 epochs: K = 7; the first move is seen after K + 1 epochs.
    path = fastest_path(NormTrend(), layers=54, block=3, epochs=90)
    assert path[:8] == [0] * 8
    assert path[8:16] == [3] * 8
    assert path[-1] == 33


def test_a_quadratic_schedule_rises_to_the_cap():
    schedule = known_schedules(20, 10)["quadratic"]
    assert schedule == Quadratic(c1=15, c2=0.15)
    # floor(15 - 0.15 (E - 10)^2) for E = 0 .. 9
    assert fastest_path(schedule, layers=20, block=1, epochs=10) == [0, 2, 5, 7, 9, 11, 12, 13, 14, 14]


def test_work_of_a_step():
    # docs/method.md: SGD 3 per layer, 2 for the first; local 2; frozen 1.
    flops = [1.0, 10.0, 100.0]
    assert step_work("local", 0, flops) == 2 + 30 + 300
    assert step_work("local", 2, flops) == 2 + 20 + 300
    assert step_work("freeze", 2, flops) == 1 + 10 + 300


def test_predicted_speedup_is_that_of_the_path():
    flops = [1.0, 1.0, 1.0]
    known = {0: 8.0, 2: 5.0}  # freeze: work 8 and 5, so time and work are one, and boundary 1 takes 7
    speedup = predicted_speedup("freeze", [0, 1, 2, 2], sgd_ms=8.0, step_ms=known, forward_flops=flops)
    assert speedup == pytest.approx(4 * 8.0 / (8 + 7 + 5 + 5))


def test_a_measured_boundary_has_its_own_time():
    # A local first layer has SGD's two products, so boundaries 0 and 1 have equal work: 8, 8 and 7 at boundary 2.
    flops = [1.0, 1.0, 1.0]
    for at_0, at_1 in ((8.0, 6.0), (6.0, 8.0)):
        known = {0: at_0, 1: at_1, 2: 4.0}
        speedup = predicted_speedup("local", [0, 0, 1, 2], sgd_ms=8.0, step_ms=known, forward_flops=flops)
        assert speedup == pytest.approx(4 * 8.0 / (2 * at_0 + at_1 + 4))
        # Boundary 2 (work 7) is halfway between 1 (work 8) and 3 (work 6), whatever boundary 0 takes.
        known = {0: at_0, 1: at_1, 3: 4.0}
        speedup = predicted_speedup("local", [2], sgd_ms=8.0, step_ms=known, forward_flops=[*flops, 1e-9])
        assert speedup == pytest.approx(8.0 / ((at_1 + 4) / 2))


def test_flops_alone_give_the_speedup_of_a_path():
    # Forward FLOPs 1, 10, 100: SGD 332; freeze 331 at boundary 1, 311 at 2; local 332 and 322.
    assert flops_speedup("freeze", [0, 1, 2, 2], [1.0, 10.0, 100.0]) == pytest.approx(4 * 332 / (332 + 331 + 2 * 311))
    assert flops_speedup("local", [1, 2], [1.0, 10.0, 100.0]) == pytest.approx(2 * 332 / (332 + 322))


@pytest.fixture(scope="module")
def result():
    settings = BenchSettings("resnet8", 4, 8, width=4, rounds=2, warm_up=1, boundaries=(0.0, 0.25, 0.75), every=2)
    return bench(settings, CPU, lambda text: None)


def test_rows_agree_with_one_another(result):
    rows = {(row["method"], row["boundary"]): row for row in result["rows"]}
    assert set(rows) == {("sgd", 0), ("local", 0)} | {
        (method, boundary) for method in ("local", "freeze", "local/2") for boundary in (2, 7)
    }
    sgd = rows["sgd", 0]
    for (method, boundary), row in rows.items():
        assert row["speedup"] == pytest.approx(sgd["step_ms"] / row["step_ms"])
        assert row["ideal"] == pytest.approx(sgd["flops"] / row["flops"])
        assert row["efficiency"] == pytest.approx(row["limit_ms"] / row["step_ms"])
        if boundary:
            parts = result["parts_ms"][boundary]
            share = {"freeze": 0.0, "local": 1.0, "local/2": 0.5}[method]
            assert row["limit_ms"] == pytest.approx(parts["prefix"] + parts["suffix"] + share * parts["products"])
            assert row["peak_memory_bytes"] < sgd["peak_memory_bytes"]
    assert rows["local", 0]["flops"] == sgd["flops"]
    assert rows["freeze", 7]["flops"] < rows["local/2", 7]["flops"] < rows["local", 7]["flops"]
    assert len(result["layer_times"]) == result["layers"] == 10
    assert {row["schedule"] for row in result["predictions"]} == {"norm-trend", "quadratic"}


def test_targets_stand_beside_what_was_measured(result):
    wanted = {"boundary 0 / plain": 9e9, "sgd / plain": 0.0, "efficiency": 0.0, "every 2 / freeze": 9e9, "memory": 1.0}
    wanted |= {"move / step": 9e9, "move, seconds": -9e9}
    lines = targets_text(result, wanted).splitlines()
    assert all(len(line) <= 80 for line in lines)
    verdicts = {line.split("  ")[0]: line.split()[-1] for line in lines[2:]}
    assert verdicts["efficiency"] == verdicts["boundary 0 / plain"] == verdicts["memory"] == "met"
    assert verdicts["move / step"] == "met"
    assert verdicts["sgd / plain"] == verdicts["move, seconds"] == "missed"


def test_measuring_leaves_the_random_state_alone():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    settings = BenchSettings("resnet8", 2, 8, width=2, rounds=1, warm_up=1, boundaries=(0.5,), every=1, layers=False)
    bench(settings, CPU, lambda text: None)
    torch.testing.assert_close(torch.rand(2), wanted)


@pytest.mark.usefixtures("drawn")
def test_command_prints_tables_and_writes_files(tmp_path, capsys):
    arguments = "bench --model resnet8 --width 2 --image-size 8 --batch 2 --rounds 1 --boundaries 0.5 --device cpu"
    code = main([*arguments.split(), "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.svg")])
    shown = capsys.readouterr().out
    assert code == 0
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert all(word in shown for word in ("plain loop", "local/4", "norm-trend"))
    assert json.loads((tmp_path / "a.json").read_text())["model"] == "resnet8"
    assert (tmp_path / "a.svg").read_text().lstrip().startswith("<?xml")


def test_the_plain_loop_is_timed_under_torch_compile_too(monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: modes.append(mode) or model)
    settings = BenchSettings("resnet8", 2, 8, width=2, rounds=1, warm_up=1, boundaries=(0.5,), layers=False)
    assert bench(settings, CPU, lambda text: None)["compiled_step_ms"] is None
    found = bench(replace(settings, compile=True), CPU, lambda text: None)
    assert (modes, found["compile_mode"]) == (["default"], "default")
    assert "plain loop, torch.compile default: " in bench_text(found)
    ratio = found["rows"][0]["step_ms"] / found["compiled_step_ms"]
    assert f"{ratio:.3f}" in targets_text(found, {"sgd / compiled loop": 9e9})
    assert BenchSetup.compile_mode.fget(SimpleNamespace(device=torch.device("cuda"))) == "reduce-overhead"


def test_a_loop_that_cannot_be_compiled_is_one_line(monkeypatch, capsys):
    def fail(model, mode):
        return lambda images: (_ for _ in ()).throw(RuntimeError("no C++ compiler\nand more"))

    monkeypatch.setattr(torch, "compile", fail)
    arguments = "bench --model resnet8 --width 2 --image-size 8 --batch 2 --device cpu --compile"
    assert main(arguments.split()) == 2
    expected = "lowcal: the plain loop cannot be compiled (no C++ compiler); use --no-compile\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--boundaries 1.5", "1.5"),
        ("--boundaries half", "separated by commas"),
        ("--batch 0", "batch"),
        ("--precision fp8", "fp8"),
        ("--step fast", "fast"),
        ("--plot a.gif", "a.gif"),
        ("--json nowhere/a.json", "nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments, named, capsys):
    code = main(["bench", "--model", "resnet8", "--device", "cpu", *arguments.split()])
    error = capsys.readouterr().err
    assert code == 2
    assert named in error
    assert error.count("\n") == 1
