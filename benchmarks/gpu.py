"""What a GPU says within a short lease, most valuable first: smoke, tests, step times, kinds of step, a real training.

    python benchmarks/gpu.py --minutes 12 --out results/gpu --data-dir path/to/cifar10

Each piece runs in a process of its own with a limit on its time, and writes OUT/PIECE.json again whenever it has
measured something; OUT/summary.json says what came of each. A piece that fails, crashes or is cut off has the reason in
its file, and the others still run. The limits grow and shrink with --minutes. `--only 'kinds-*'` chooses pieces.
`--small --device cpu` tries the script out.

- smoke-METHOD: short runs in each precision and kind of step, with moves; a line each;
- tests: those that are marked `gpu`;
- NETWORK-graphed, NETWORK-eager: what `lowcal bench` gives for the five networks of the paper (bf16, channels last);
- NETWORK-overlapped: the same with local updates on a second stream, for images of 32x32;
- kinds-NETWORK: the kinds of step next to torch.compile;
- first-step: seconds before the first step of a `compare` with three arms and step=auto;
- smoke-overlapped, smoke-compiled: as smoke, with local updates on a second stream, and with compiled steps;
- training: ResNet18 on all CIFAR-10 images, for as many epochs as the time left allows.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import pytest
import torch
import torch._dynamo  # loaded once, not by each piece

import devices
import steps
from common import Log, script
from lowcal.data import Dataset
from lowcal.errors import LowcalError
from lowcal.experiments.arms import Arm
from lowcal.experiments.assemble import load_data
from lowcal.experiments.bench.run import bench
from lowcal.experiments.bench.setup import BenchSettings
from lowcal.experiments.bench.show import bench_text
from lowcal.experiments.compare import compare, train_in_turn
from lowcal.experiments.recipe import Recipe
from lowcal.experiments.recipe_text import apply_settings, dump_recipe, load_recipe
from lowcal.files import first_line
from lowcal.methods import METHODS
from pieces import PLANNED, Job, Piece, Record, run

TRAINING = 120.0  # seconds of PLANNED that no other piece takes
ARMS = [Arm(method, 0) for method in ("sgd", "local", "freeze")]
TESTS = Path(__file__).parents[1] / "tests"
_SMALL = {"batch": 64, "image_size": 32}
_LARGE = {"batch": 64, "image_size": 224, "classes": 1000}
_WAY = {"precision": "bf16", "channels_last": True, "layers": False, "compile": False, "warm_up": 1}
NETWORKS = {
    "resnet18-32": BenchSettings("resnet18", **_SMALL, **_WAY, rounds=9),
    "resnet50-224": BenchSettings("resnet50", **_LARGE, **_WAY, rounds=5),
    "mobilenet_v2-224": BenchSettings("mobilenet_v2", **_LARGE, **_WAY, rounds=5, epochs=150),
    "vgg13-32": BenchSettings("vgg13", **_SMALL, **_WAY, rounds=9),
    "resnet34-224": BenchSettings("resnet34", **_LARGE, **_WAY, rounds=5),
}
# Kinds of step, and modes of torch.compile for a plain loop.
KINDS = ("eager", "graphed", "reduce-overhead", "graphed-compiled", "default", "compiled")


def all_pieces(*, small: bool, cuda: bool) -> dict[str, Piece]:
    """Return all pieces by name, the most valuable first."""
    networks, recorded = NETWORKS, "graphed" if cuda else "eager"
    if small:
        tiny = BenchSettings("resnet8", batch=2, image_size=8, width=2, rounds=1, boundaries=(0.5,), **_WAY)
        networks = {"resnet18-32": tiny}
    kinds = {"resnet18-32": 100.0, "resnet50-224": 110.0}
    times = {"resnet18-32": 25.0, "vgg13-32": 25.0}
    found = {f"smoke-{method}": Piece(partial(smoke, [method], [recorded, "eager"]), 20.0) for method in METHODS}
    if cuda:
        found["smoke-overlapped"] = Piece(partial(smoke, ["local"], ["graphed-overlapped"]), 20.0)
    found["tests"] = Piece(gpu_tests, 120.0)
    for name, each in networks.items():
        found[f"{name}-{recorded}"] = Piece(partial(step_times, replace(each, step=recorded)), times.get(name, 75.0))
        if cuda and each.image_size == 32:
            settings = replace(each, step="graphed-overlapped", every=1)
            found[f"{name}-overlapped"] = Piece(partial(step_times, settings), 25.0)
    found["resnet18-32-eager"] = Piece(partial(step_times, networks["resnet18-32"]), 30.0)
    for name, seconds in kinds.items():
        if name in networks:
            chosen = KINDS if cuda else KINDS[:1]
            found[f"kinds-{name}"] = Piece(partial(kinds_of_step, networks[name], chosen), seconds)
    found["first-step"] = Piece(first_step, 60.0)
    if cuda:
        found["smoke-compiled"] = Piece(
            partial(smoke, ["local", "sgd", "freeze"], ["graphed-compiled", "compiled"]), 60.0
        )
    return found | {"training": Piece(training, float("inf"))}


def smoke(methods: Sequence[str], kinds: Sequence[str], job: Job, record: Record) -> None:
    """Train a small network for four epochs with moves, in each precision and kind of step."""
    lines: list[dict[str, Any]] = []
    base = apply_settings(
        load_recipe("resnet18-cifar10"),
        [
            "epochs=4",
            "batch=16",
            "model={name: resnet8, width: 2}" if job.small else "model.name=resnet8",
            "data={name: synthetic, train_images: 80, test_images: 16, image_size: 32, classes: 4}",
            "local.schedule={name: fixed, epochs: {1: 3, 3: 6}}",
            "checkpoint.minutes=null",
        ],
    )
    data = load_data(base, None)
    for precision in ("bf16", "float32", "fp16")[: 1 if job.small else None]:
        for kind in dict.fromkeys(kinds):
            for method in methods:
                recipe = apply_settings(base, [f"precision={precision}", f"step={kind}"])
                start = monotonic()
                outcome, reason = _try(recipe, [Arm(method, 0)], data, job)
                place = {"method": method, "precision": precision, "step": kind}
                lines.append({**place, "outcome": outcome, "reason": reason, "seconds": monotonic() - start})
                print(f"{outcome:8}{method}/{precision}/{kind} {reason or ''}", flush=True)
                record.add(lines=lines)
    failed = [line for line in lines if line["outcome"] == "failed"]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(lines)} failed, the first with {failed[0]['reason']}")


def _try(recipe: Recipe, arms: Sequence[Arm], data: Dataset, job: Job) -> tuple[str, str | None]:
    with TemporaryDirectory() as folder:
        try:
            device = torch.device(job.device)
            train_in_turn(recipe, arms, Path(folder), data=data, device=device, watcher=Course())
        except LowcalError as error:
            return "refused", str(error)
        except Exception as error:
            return "failed", f"{type(error).__name__}: {first_line(error)}"
    return "ok", None


def gpu_tests(job: Job, record: Record) -> None:
    """Run the tests that are marked `gpu`; what came of each is written as it ends."""
    outcomes: dict[str, str] = {}

    class Watch:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                outcomes[report.nodeid] = report.outcome
                counts = {each: list(outcomes.values()).count(each) for each in ("passed", "failed", "skipped")}
                record.add(counts=counts, failed=[name for name, each in outcomes.items() if each == "failed"])

    marked = sorted(str(file) for file in TESTS.rglob("test_*.py") if "pytest.mark.gpu" in file.read_text())
    options = ["-p", "no:benchmark", "-p", "no:cacheprovider", "-m", "gpu", "--rootdir", str(TESTS.parent)]
    code = pytest.main(["-q", *options, *(marked[:1] if job.small else marked)], plugins=[Watch()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest ended with {code}; {record.facts.get('counts')}")


def step_times(settings: BenchSettings, job: Job, record: Record) -> None:
    """Write what `lowcal bench --json` writes."""
    result = bench(settings, torch.device(job.device), print)
    record.add(**result)
    print(bench_text(result))


def kinds_of_step(settings: BenchSettings, kinds: Sequence[str], job: Job, record: Record) -> None:
    """Time our kinds of step of `sgd` next to the plain loop, eager and under torch.compile."""
    settings = replace(settings, boundaries=(), every=1, rounds=min(settings.rounds, 5))
    for facts in steps.kinds(settings, kinds, torch.device(job.device)):
        record.add(**facts)


class Course(Log):
    """Keeps the epochs of each arm, and when each ended; `begun` is called when an arm first shows its progress."""

    def __init__(self, record: Record | None = None, begun: Callable[[Any], None] | None = None) -> None:
        self._record, self._begun = record, begun
        self.epochs: dict[str, list[dict[str, Any]]] = {}
        self.ends: list[float] = []

    def step(self, _: Any, progress: Any) -> None:
        """Call `begun`."""
        if self._begun is not None:
            self._begun(progress)

    def epoch(self, arm: Any, record: Mapping[str, Any]) -> None:
        """Keep the epoch, and write it."""
        self.ends.append(monotonic())
        self.epochs.setdefault(arm.method, []).append(dict(record))
        if self._record is not None:
            super().epoch(arm, record)
            self._record.add(course=self.epochs)


class _Begun(Exception):
    pass


def first_step(job: Job, record: Record) -> None:
    """Time a `compare` of three arms with step=auto until its first step; the images are decoded beforehand."""
    recipe, _ = _cifar10(job, ["epochs=20", "step=auto"])  # leaves decoded images in the cache
    start = monotonic()

    def begun(progress: Any) -> None:
        stepping = progress.step * recipe.batch.size / progress.images_per_second
        record.add(before_first_step_s=monotonic() - start - stepping)
        raise _Begun

    methods, device = [arm.method for arm in ARMS], torch.device(job.device)
    data_dir = None if recipe.data.name == "synthetic" else job.data_dir
    with TemporaryDirectory() as folder, suppress(_Begun):
        watcher = Course(begun=begun)
        compare(recipe, methods, 1, Path(folder) / "runs", data_dir=data_dir, device=device, watcher=watcher)


def training(job: Job, record: Record) -> None:
    """Train the arms for as many epochs as surely end in time; two epochs of sgd, tried before, say how many."""
    if job.data_dir is None and not job.small:
        raise LowcalError("no folder with CIFAR-10; give --data-dir")
    recipe, data = _cifar10(job, [f"step={job.recorded}", "epochs=2"])
    device = torch.device(job.device)
    data = data.to(device)
    trial = Course()
    with TemporaryDirectory() as folder:
        train_in_turn(recipe, ARMS[:1], Path(folder), data=data, device=device, watcher=trial)
    epoch_s = trial.ends[1] - trial.ends[0]  # with its evaluation
    # A quarter is left for the moves, which record graphs again, and for the start.
    epochs = min(90, int(0.75 * (job.until - monotonic()) / (len(ARMS) * epoch_s)))
    record.add(epoch_seconds=epoch_s, epochs=epochs)
    if epochs < 2:
        raise TimeoutError(f"an epoch of the {len(ARMS)} arms takes {len(ARMS) * epoch_s:.0f} s: no time for two")
    epochs = min(epochs, 3) if job.small else epochs
    recipe = apply_settings(recipe, [f"epochs={epochs}", f"local.decay_every={max(1, epochs // 3)}"])
    record.add(recipe=dump_recipe(recipe))
    with TemporaryDirectory() as folder:
        train_in_turn(recipe, ARMS, Path(folder), data=data, device=device, watcher=Course(record))


def _cifar10(job: Job, settings: Sequence[str]) -> tuple[Recipe, Dataset]:
    """The recipe of the real training, and its images: synthetic ones where there is no folder."""
    settings = [*settings, "precision=bf16"]
    if job.small:
        settings += ["batch=8", "model={name: resnet8, width: 2}"]
    if job.small or job.data_dir is None:
        images = 32 if job.small else 5000
        settings.append(
            f"data={{name: synthetic, train_images: {images}, test_images: {images}, image_size: 32, classes: 10}}"
        )
    recipe = apply_settings(load_recipe("resnet18-cifar10-modern"), settings)
    return recipe, load_data(recipe, None if job.small else job.data_dir)


def main() -> None:
    """Run, print and write; exit with 1 if a piece did not end well."""
    parser = script(__doc__)
    parser.add_argument("--minutes", type=float, default=PLANNED / 60, help="for everything")
    parser.add_argument("--data-dir", type=Path, help="folder of CIFAR-10, for the real training")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --small")
    parser.add_argument("--small", action="store_true", help="tiny networks and images, to try the script out")
    parser.add_argument("--only", default="*", help="names of pieces, as in 'kinds-*'")
    arguments = parser.parse_args()
    every = all_pieces(small=arguments.small, cuda=arguments.device.startswith("cuda"))
    chosen = {name: piece for name, piece in every.items() if fnmatch(name, arguments.only)}
    if not chosen:
        parser.error(f"--only {arguments.only}: no such piece; there are {', '.join(every)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    job = Job(arguments.device, arguments.data_dir, arguments.small)
    seconds = 60 * arguments.minutes
    left = run(chosen, job, arguments.out, seconds, reserve=TRAINING * seconds / PLANNED if "training" in chosen else 0)
    print(devices.goals_table(devices.goals(arguments.out)).text())
    print("left out:", *left or ["nothing"], sep="\n  ")
    raise SystemExit(bool(left))


if __name__ == "__main__":
    main()
