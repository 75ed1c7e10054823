import json
from dataclasses import replace

import pytest
import torch

from lowcal import overlap
from lowcal.errors import LowcalError
from lowcal.experiments.arms import Arm
from lowcal.experiments.assemble import build_run, check, find_device, load_data
from lowcal.experiments.backends import puts_channels_last
from lowcal.experiments.compare import compare, train_in_turn
from lowcal.experiments.recipe import Recipe
from lowcal.experiments.recipe_text import apply_settings, load_recipe
from lowcal.steps import graphed
from lowcal.training import step_builder
from lowcal.training.run_folder import RunFolder

from ..steps.software_graphs import LateStream, SoftwareGraphs

CPU = torch.device("cpu")


class Diary:
    """A watcher that writes everything down."""

    def __init__(self):
        self.notes, self.begun, self.steps, self.epochs = [], [], [], []

    def note(self, text):
        self.notes.append(text)

    def stage(self, text, done=0, total=0):
        pass

    def begin(self, arms, finished, epochs, *, later=0):
        self.begun.append((tuple(arms), tuple(finished), epochs, later))

    def step(self, arm, progress):
        self.steps.append((arm, progress.epoch))

    def epoch(self, arm, record):
        self.epochs.append((arm.folder, record["epoch"]))


def recipe(*settings: str) -> Recipe:
    data = "data={name: synthetic, train_images: 48, test_images: 24, image_size: 8, classes: 3}"
    small = ["epochs=3", "batch=16", "model.width=4", data, "local.schedule={name: fixed, epochs: {1: 2}}"]
    return apply_settings(load_recipe("digits"), [*small, *settings])


def run_compare(out, chosen, methods, seeds=1, diary=None):
    return compare(chosen, methods, seeds, out, data_dir=None, device=CPU, watcher=diary or Diary())


def test_arms_take_turns_epoch_by_epoch_in_a_rotating_order_seed_by_seed(tmp_path):
    diary = Diary()
    run_compare(tmp_path / "out", recipe("epochs=2"), ["sgd", "freeze"], 2, diary)
    assert diary.epochs == [
        *[("sgd-seed0", 0), ("freeze-seed0", 0), ("freeze-seed0", 1), ("sgd-seed0", 1)],
        *[("sgd-seed1", 0), ("freeze-seed1", 0), ("freeze-seed1", 1), ("sgd-seed1", 1)],
    ]
    assert diary.begun[1] == ((Arm("sgd", 1), Arm("freeze", 1)), (0, 0), 2, 0)
    assert diary.begun[0][3] == 4
    assert {arm for arm, _ in diary.steps} == {Arm(m, s) for m in ("sgd", "freeze") for s in (0, 1)}


def test_a_later_call_does_not_measure_the_steps_again(tmp_path, monkeypatch):
    monkeypatch.setattr(graphed, "GRAPHS", SoftwareGraphs)
    monkeypatch.setattr(overlap, "STREAM", LateStream)
    monkeypatch.setattr(step_builder, "candidates", lambda device: ("eager", "graphed"))
    chosen = recipe("epochs=1", "step=auto")

    def choose(modes, seconds):
        return {mode: seconds(mode) for mode in sorted(modes, key=lambda mode: mode == "graphed")}

    for methods, trials in ((["freeze"], choose), (["freeze", "sgd"], None)):
        monkeypatch.setattr(step_builder, "_times", {})
        monkeypatch.setattr(step_builder, "fastest", trials)
        diary = Diary()
        run_compare(tmp_path / "out", chosen, methods, diary=diary)
    assert any(f"sgd-seed0: step=graphed, as measured before for {tmp_path / 'out'}:" in note for note in diary.notes)


def test_the_report_holds_the_figures_of_the_run_folders(tmp_path):
    report = run_compare(tmp_path / "out", recipe(), ["sgd", "local"])
    rows = {row["method"]: row for row in report.summary["rows"]}
    for method, row in rows.items():
        text = (tmp_path / "out" / f"{method}-seed0" / "epochs.jsonl").read_text()
        records = [json.loads(line) for line in text.splitlines()]
        assert row["seconds"] == pytest.approx(sum(record["seconds"] for record in records))
        assert row["top1_error"] == records[-1]["top1_error"]
        assert row["boundary"] == records[-1]["boundary"] == (2 if method == "local" else 0)
    assert rows["local"]["speedup"] == pytest.approx(rows["sgd"]["seconds"] / rows["local"]["seconds"])
    assert rows["local"]["flops_ratio"] < 1


def test_arms_of_one_seed_start_alike_and_of_two_seeds_differ(tmp_path):
    chosen = recipe()
    data = load_data(chosen, None)

    def weights(method: str, seed: int) -> torch.Tensor:
        own = replace(chosen, seed=seed)
        folder = tmp_path / f"{method}{seed}"
        run = build_run(own, method=method, folder=folder, data=data, device=CPU)
        return torch.cat([parameter.flatten() for parameter in run.model.parameters()])

    first = weights("sgd", 0)
    assert torch.equal(first, weights("local", 0))
    assert not torch.equal(first, weights("sgd", 1))


def test_checking_moves_no_random_state_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = recipe()
    data = load_data(chosen, None)
    before = torch.get_rng_state()
    check(chosen, ["sgd", "local", "freeze"], data, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert list(tmp_path.iterdir()) == []


def test_the_data_is_the_same_for_all_seeds():
    first, second = (load_data(recipe(f"seed={seed}"), None) for seed in (0, 1))
    assert torch.equal(first.train.pixels, second.train.pixels)
    other = load_data(recipe("data.seed=1"), None)
    assert not torch.equal(first.train.pixels, other.train.pixels)


def test_an_arm_that_diverges_is_named_and_the_others_are_kept(tmp_path):
    with pytest.raises(LowcalError, match=r"^sgd-seed0: .* step \d+"):
        run_compare(tmp_path / "out", recipe("optimizer.lr=1e30"), ["sgd", "freeze"])


def test_a_run_computes_with_the_recipes_threads_and_gives_the_others_back(tmp_path):
    before = torch.get_num_threads()
    run_compare(tmp_path / "out", recipe("epochs=1", f"threads={before + 1}"), ["sgd"])
    environment = json.loads((tmp_path / "out" / "sgd-seed0" / "environment.json").read_text())
    assert environment["threads"] == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("asked", "memory_format"), [("true", torch.channels_last), ("null", torch.channels_last),
                                                      ("false", torch.contiguous_format)])  # fmt: skip
def test_the_memory_format_reaches_network_and_batches(tmp_path, asked, memory_format):
    chosen = recipe(f"channels_last={asked}", "data.name=synthetic", "data.train_images=20", "data.test_images=10")
    run = build_run(chosen, method="sgd", folder=tmp_path / "run", data=load_data(chosen, None), device=CPU)
    images, _ = next(iter(run.train))
    for tensor in (images, run.model.stages[0][0].conv1.weight):
        assert tensor.is_contiguous(memory_format=memory_format)
        assert sum(tensor.is_contiguous(memory_format=f) for f in (torch.channels_last, torch.contiguous_format)) == 1


def test_channels_come_last_where_steps_are_the_faster_for_it():
    chosen = [
        puts_channels_last(None, torch.device(device), precision)
        for device in ("cpu", "cuda") for precision in ("float32", "bf16", "fp16")
    ]  # fmt: skip
    assert chosen == [True, True, True, False, True, True]
    assert puts_channels_last(False, CPU, "float32") is False


@pytest.mark.parametrize(("width", "sliced"), [(4, ["stages.1.0.shortcut.0", "stages.2.0.shortcut.0"]), (16, [])])
def test_the_record_names_the_layers_whose_input_is_sliced(tmp_path, width, sliced):
    chosen = recipe(
        "epochs=1", f"model.width={width}", "data.name=synthetic", "data.train_images=20", "data.test_images=10"
    )
    build_run(chosen, method="sgd", folder=tmp_path / "run", data=load_data(chosen, None), device=CPU)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["sliced_layers"] == sliced


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cpu:0", "CUDA", "mps", "cuda:4096"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(LowcalError, match="device"):
        find_device(name)


def test_devices_by_name():
    assert find_device("cpu") == CPU
    assert find_device("auto").type in {"cpu", "cuda"}


def test_the_arms_share_the_images_on_the_device(tmp_path, monkeypatch):
    """The meta device stands for any that is not the one that the images were read to."""
    chosen, seen = recipe(), []
    monkeypatch.setattr("lowcal.experiments.compare.prepare", lambda *_, data, **__: seen.append(data))
    monkeypatch.setattr("lowcal.experiments.compare.take_turns", lambda *_, **__: None)
    data, meta = load_data(chosen, None), torch.device("meta")
    arms = [Arm(method, 0) for method in ("sgd", "local")]
    train_in_turn(chosen, arms, tmp_path, data=data, device=meta, watcher=None)
    assert seen[0] is seen[1]
    assert seen[0].train.pixels.device == seen[0].test.pixels.device == meta


def test_sgd_in_the_time_of_another_method(tmp_path, monkeypatch):
    """Sized by measured times: 0.4 of 5 epochs' time is 2 epochs; the whole schedule passes in them."""
    seconds = {"sgd": 10.0, "freeze": 4.0}
    finish = RunFolder.summarise

    def summarise(self):
        method = self.read_identity()["method"]
        return self.write_summary(
            {**finish(self), "seconds": seconds[method] if "compressed" not in self.path.name else 4.1}
        )

    monkeypatch.setattr(RunFolder, "summarise", summarise)
    chosen, out = recipe("epochs=5", "lr_schedule.warmup_epochs=2"), tmp_path / "out"
    names = ["sgd", "freeze", "sgd-compressed"]
    report = run_compare(out, chosen, names, 2)
    assert [row["method"] for row in report.summary["rows"]] == ["sgd", "freeze", "sgd-compressed-2"]
    rates = [json.loads(line)["lr"] for line in (out / "sgd-compressed-2-seed1/epochs.jsonl").read_text().splitlines()]
    assert len(rates) == 2
    assert rates[0] == pytest.approx(0.05)  # a warm-up of 0.8 epochs instead of two
    assert "SGD given the same time (2 epochs, 4.1 s)" in report.headline
    diary = Diary()
    run_compare(out, chosen, names, 2, diary)  # nothing is left to do
    assert not diary.epochs
    with pytest.raises(LowcalError, match="another recipe: epochs"):
        run_compare(out, recipe("epochs=4", "lr_schedule.warmup_epochs=2"), names, 2)


@pytest.mark.parametrize("methods", [["freeze", "sgd-compressed"], ["sgd", "sgd-compressed"]])
def test_the_rival_needs_sgd_and_another_method(tmp_path, methods):
    with pytest.raises(LowcalError, match=r"is sized by sgd's time and another method's; as in --methods sgd,freeze"):
        run_compare(tmp_path / "out", recipe(), methods)
    assert not (tmp_path / "out").exists()
