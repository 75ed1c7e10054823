"""The scripts in benchmarks/, on tiny networks: what they run, what they write, and that their arithmetic is right."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import cifar10
import performance
import prune_runs
import steady_speedup
import steps
import whole_run
from lowcal.experiments.bench.setup import BenchSettings, BenchSetup
from lowcal.experiments.recipe_text import apply_settings, load_recipe
from lowcal.models import build_model
from lowcal.steps import graphed

from .steps.software_graphs import SoftwareGraphs

CPU = torch.device("cpu")
NAME = "resnet18-cifar10"
TINY = whole_run.Size(batch=5, steps=2, epochs=4, test_images=10, width=2)
NETWORK = BenchSettings("resnet8", batch=2, image_size=8, width=2, rounds=1, warm_up=1, runs=1)


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(graphed, "GRAPHS", SoftwareGraphs)


def tiny_recipe(name):
    """A published recipe with a tiny network."""
    return apply_settings(load_recipe(name), ["model.name=resnet8"])


@pytest.fixture(scope="module")
def result():
    """Whole runs of a tiny network, as they are written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_run, "ROUNDS", 1)
        patch.setattr(whole_run, "load_recipe", tiny_recipe)
        return json.loads(json.dumps(whole_run.measure(NAME, TINY, None)))


def test_a_whole_run_is_held_beside_what_its_steps_predict(result):
    runs, rows = result["runs"], {row["method"]: row for row in result["rows"]}
    step_ms = {(time["method"], time["boundary"]): time["step_ms"] for time in result["step_times"]}
    assert len(step_ms) == len(result["step_times"]), "one is there twice"
    step_ms["freeze", 0] = step_ms["local", 0]
    assert {method: len(run["seconds"]) for method, run in runs.items()} == {"sgd": 4, "local": 4, "freeze": 4}
    for method, row in rows.items():
        path = runs[method]["boundary"]
        assert row["last_boundary"] == path[-1] > 0, "Algorithm 1 has not moved, and nothing is tested"
        assert row["measured"] == pytest.approx(sum(runs["sgd"]["seconds"]) / sum(runs[method]["seconds"]))
        assert row["predicted"] == pytest.approx(4 * step_ms["sgd", 0] / sum(step_ms[method, at] for at in path))
        assert row["ratio"] == pytest.approx(row["measured"] / row["predicted"])


def test_the_papers_speedup_and_what_its_schedule_gives_at_most_stand_beside_it(result):
    rows, path = {row["method"]: row for row in result["rows"]}, result["fastest_published_path"]
    step_ms = {(time["method"], time["boundary"]): time["step_ms"] for time in result["step_times"]}
    assert (rows["local"]["paper"], rows["freeze"]["paper"]) == (1.51, 1.65)
    assert len(path) == load_recipe(NAME).epochs
    assert {(method, at) for method in rows for at in (path[45], path[-1])} <= step_ms.keys()
    for method, row in rows.items():
        least = min(time for (name, _), time in step_ms.items() if name == method)
        assert 1 < row["most_by_flops"] < {"local": 1.5, "freeze": 3.0}[method]
        assert 0 < row["most_by_steps"] <= step_ms["sgd", 0] / min(least, step_ms["local", 0])


def test_at_most_is_by_the_flops_of_the_published_network_on_the_published_path():
    settings = BenchSettings("resnet18", batch=1, image_size=32, width=1, every=1)
    path = whole_run.fastest_published_path(load_recipe(NAME), BenchSetup(settings, CPU))
    # Eq. 2 for 21 layers, blocks of 2, 90 epochs: K = 11, so a move every 12 epochs.
    assert path == [2 * (epoch // 12) for epoch in range(90)]
    # A layer's forward pass in units of a 3x3 convolution of the first stage: of its 64 channels, at 32x32.
    stage = [0.5, 1.0, 1 / 18, 1.0, 1.0]
    layers = [3 / 64, *[1.0] * 4, *stage, *stage, *stage, 512 * 10 / (64 * 64 * 9 * 32 * 32)]
    unit = 2.0 * 64 * 64 * 9 * 32 * 32
    assert sorted(whole_run.published_flops(settings)) == pytest.approx(sorted(unit * layer for layer in layers))


def test_a_table_of_all_networks_in_the_papers_order(result, tmp_path):
    other = {**result, "recipe": "mobilenet_v2-imagenet", "model": "mobilenet_v2"}
    for name, content in (("a", other), ("b", result), ("old", {"format": 1})):
        (tmp_path / f"whole-run-{name}.json").write_text(json.dumps(content))
    lines = whole_run.write_table(tmp_path).markdown().splitlines()
    assert (tmp_path / "whole-runs.md").read_text().splitlines() == lines
    networks = [line.split(" | ")[0].removeprefix("| ").split(" ")[0] for line in lines[2:]]
    assert networks == ["resnet8", "resnet8", "mobilenet_v2", "mobilenet_v2"]
    assert len({line.count("|") for line in lines}) == 1
    assert "| local |" in lines[2]
    assert f"| 1.51× | {result['rows'][0]['measured']:.2f}× |" in lines[2]


@pytest.mark.parametrize("name", whole_run.SIZES)
def test_shortened_recipes_are_whole_and_their_networks_can_be_had(name):
    size, published = whole_run.SIZES[name], load_recipe(name)
    settings = whole_run.shortened(published, size, synthetic=True)
    recipe = apply_settings(published, settings)
    assert recipe.lr_schedule.epochs == published.epochs > recipe.epochs
    assert recipe.data.train_images == size.steps * recipe.batch.size
    assert min(recipe.data.train_images, recipe.data.test_images) >= recipe.data.classes
    assert recipe.local == published.local
    with torch.device("meta"):
        build_model(recipe.model.name, classes=size.classes, width=recipe.model.width)


def test_the_kinds_of_step_are_timed_in_turn(graphs, tmp_path):
    steps.write_kinds(tmp_path / "kinds", NETWORK, ("eager", "graphed"), CPU)
    result = json.loads((tmp_path / "kinds.json").read_text())
    assert [(row["step"], row["method"], row["boundary"]) for row in result["rows"]] == [
        (kind, method, boundary)
        for kind in ("eager", "graphed")
        for method, boundary in (("sgd", 0), ("local", 0), ("local", 5), ("freeze", 5))
    ]
    assert all(row["plain_over_step"] == result["plain_step_ms"] / row["step_ms"] for row in result["rows"])
    assert len((tmp_path / "kinds.md").read_text().splitlines()) == 2 + 8


def test_memory_formats_are_timed_in_turn(monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "FORMAT_ROUNDS", 1)
    steps.write_formats(tmp_path / "formats", {"tiny": NETWORK}, CPU)
    rows = json.loads((tmp_path / "formats.json").read_text())["rows"]
    assert [(row["method"], row["boundary"]) for row in rows] == [("sgd", 0), ("local", 0), ("local", 5), ("freeze", 5)]
    assert all(row["first_over_last"] == row["first"]["median"] / row["last"]["median"] for row in rows)
    assert len((tmp_path / "formats.md").read_text().splitlines()) == 2 + 4


@pytest.fixture
def script(graphs, monkeypatch, tmp_path):
    """performance.py with tiny networks."""
    tiny = replace(NETWORK, layers=False, boundaries=(0.5,), precision="bf16", channels_last=True)
    monkeypatch.setattr(performance, "NETWORKS", dict.fromkeys(performance.NETWORKS, tiny))
    monkeypatch.setattr(performance, "KINDS", ("eager", "graphed"))
    monkeypatch.setattr(steps, "FORMAT_ROUNDS", 1)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["performance.py", "--out", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as ended:
            performance.main()
        return ended.value.code

    return run


def test_the_script_measures_what_is_asked_for(script, tmp_path, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(whole_run, "write", lambda name, *_: trained.append(name))
    for pattern in ("vgg13-32", "memory-*", f"whole-run-{NAME}"):
        assert script("--only", pattern) == 0
    assert trained == [NAME]
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"vgg13-32.{kind}" for kind in ("json", "md", "svg")),
        *(f"memory-formats.{kind}" for kind in ("json", "md")),
    }
    assert "move / step" in capsys.readouterr().out
    assert script("--only", "resnet81") == 2
    assert "no such piece; there are resnet18-32" in capsys.readouterr().err


def test_whole_runs_are_written_with_the_table_of_all(result, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(whole_run, "measure", lambda *_: result)
    whole_run.write(NAME, None, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"whole-run-{NAME}.json", "whole-runs.md"}
    assert "moves took" in capsys.readouterr().out


def test_a_piece_that_fails_is_named_and_the_others_run(script, tmp_path, capsys, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(steps, "write_steps", fail)
    assert script("--only", "resnet18-32*") == 1
    assert "resnet18-32: RuntimeError: no such kernel\n" in capsys.readouterr().out.partition("failed:")[2]
    assert (tmp_path / "resnet18-32-kinds.json").exists(), "the part after it"


def slowed_runs():
    """Epochs of a machine whose load changes from turn to turn, with a burst now and then; two seeds."""
    load = {(seed, turn): 1.0 + (7 * turn + 3 * seed) % 5 for seed in (0, 1) for turn in range(12)}
    work = {"sgd": lambda turn: 1.0, "sgd-8": lambda turn: 1.0, "freeze": lambda turn: 0.5 if turn >= 6 else 1.0}
    runs = {}
    for name, share in work.items():
        turns = range(8 if name == "sgd-8" else 12)
        runs[name] = {
            seed: [
                {
                    "epoch": turn,
                    "boundary": 4 * (share(turn) < 1),
                    "flops": 10,
                    "seconds": share(turn) * load[seed, turn] * (3.0 if name == "freeze" and turn in (1, 8) else 1.0),
                }
                for turn in turns
            ]
            for seed in (0, 1)
        }
    return runs


def test_steady_times_are_those_of_a_quiet_machine():
    times = steady_speedup.steady_times(slowed_runs())
    assert times == pytest.approx({"sgd": 12.0, "sgd-8": 8.0, "freeze": 6 + 6 * 0.5})


def test_epochs_of_networks_that_differ_in_size_are_of_different_kinds():
    small, large = {"boundary": 0, "flops": 5}, {"boundary": 0, "flops": 10}
    kind = steady_speedup.kind_of
    assert kind("sgd", small) == kind("local", large) == steady_speedup.PLAIN
    assert len({kind("prune", small), kind("prune", large), steady_speedup.PLAIN}) == 3
    assert kind("stochastic-depth", small) == kind("stochastic-depth", large) != steady_speedup.PLAIN
    assert kind("local", {"boundary": 2, "flops": 5}) != kind("freeze", {"boundary": 2, "flops": 5})


def test_one_fast_epoch_among_many_of_sgd_decides_nothing():
    runs = slowed_runs()
    runs["sgd"][0][5]["seconds"] /= 10
    assert steady_speedup.steady_times(runs) == pytest.approx({"sgd": 12.0, "sgd-8": 8.0, "freeze": 9.0})


def test_of_two_seeds_both_are_shown():
    assert cifar10.of_seeds(1.25, [1.0, 2.0], "×") == "1.25× (1.00 to 2.00)"
    assert cifar10.of_seeds(2.0, [1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert cifar10.of_seeds(2.0, [2.0]) == cifar10.of_seeds(2.0, [2.0, 2.0]) == "2.00"


def test_what_was_pruned_is_told_from_the_runs():
    def run(method, seed, error, channels, flops):
        records = [{"channels": count, "flops": each} for count, each in zip(channels, flops, strict=True)]
        return SimpleNamespace(
            method=method,
            seed=seed,
            results={"top1_error": error, "flops": sum(flops)},
            records=records,
            settings={"model": {"width": 8}, "prune": {"ratio": 0.5}, "epochs": 3},
            model="vgg13",
            dataset="digits",
            code="0123456789ab",
            environment={},
        )

    none = [None] * 3
    runs = [
        run("sgd", 0, 10.0, none, [100, 100, 100]),
        run("sgd", 1, 12.0, none, [100, 100, 100]),
        run("prune", 0, 11.0, [20, 15, 15], [100, 80, 60]),
        run("prune", 1, 14.0, [20, 20, 10], [100, 100, 40]),
    ]
    row = prune_runs.row(runs)
    assert row["channels"] == [[20, 15], [20, 10]]
    assert row["epochs_of_removal"] == [[2], [3]]
    assert row["flops_ratio"] == [0.8, 0.8]
    assert row["last_epoch_flops_ratio"] == [0.6, 0.4]
    assert row["code"] == ["0123456789ab"]
    line = prune_runs.table([row]).markdown().splitlines()[-1]
    assert "| 11.00 (10.00 to 12.00) | 12.50 (11.00 to 14.00) | 12 (10 to 15) of 20 |" in line
    with pytest.raises(SystemExit):
        prune_runs.row(runs[1:])
