"""Fine-tuning a part of a network against training all of it, each at its best rate, on one CPU thread.

`pretrain` trains the ViT on the even classes of CIFAR-10. `tune` finds the rates on held-out training images: all of
them at the middle length, the best two at the others. It times nothing and goes on where it stopped. `run` trains all
arms at their best rates, one epoch each in turn, and times them. `report` writes tables and figures to
results/finetune. NETWORK is efficientnet or vit.

    python benchmarks/finetuning.py pretrain --data-dir CIFAR10 --work FOLDER
    python benchmarks/finetuning.py tune NETWORK --data-dir CIFAR10 --work FOLDER
    python benchmarks/finetuning.py run NETWORK --data-dir CIFAR10 --work FOLDER
    python benchmarks/finetuning.py report
"""

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import finetuning_report
import lowcal
from common import RESULTS
from finetuning_arms import TASKS, WEIGHTS, Family, Rate, Task, vit
from lowcal.data import load
from lowcal.data.dataset import Images, subset
from lowcal.files import atomic_write
from lowcal.training.environment import gather_environment

FOLDER = RESULTS / "finetune"
WARMUP = 0.1  # of the steps


class Data(NamedTuple):
    """Images float32 (N, 3, H, W) from -1 to 1 and labels int64 (N,), for training and for testing."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def of_classes(images: Images, odd: int) -> Images:
    """The images whose class number is odd, or even, with new numbers from 0 to 4."""
    own = images.take((images.labels % 2 == odd).nonzero()[:, 0])
    return Images(own.pixels, own.labels // 2)


def read(task: Task, folder: Path, seed: int, *, validation: bool) -> Data:
    """Draws the images of a seed; with `validation` those for testing are held-out training images."""
    data = load("cifar10", data_dir=folder, evaluate="validation" if validation else "test", seed=seed)
    found: list[Tensor] = []
    for part, count in ((data.train, task.images), (data.test, task.tests)):
        assert isinstance(part, Images)
        own = of_classes(part, 1) if task.odd else part
        own = subset(own, count, seed, "images").enlarged(task.size, None)
        found += (own.pixels / 127.5 - 1).contiguous(memory_format=torch.channels_last), own.labels
    return Data(*found)


def train(
    task: Task, family: Family, epochs: int, rate: Rate, model: nn.Module, data: Data, seed: int
) -> Iterator[None]:
    """Trains the network in place; stops after each epoch."""
    if family.lora:
        from peft import LoraConfig, get_peft_model

        where = r".*\.attn\.(qkv|proj)"
        adapters = LoraConfig(
            r=family.lora, lora_alpha=2 * family.lora, target_modules=where, modules_to_save=[task.head]
        )
        model = get_peft_model(model, adapters)  # type: ignore[assignment,arg-type]
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[f".{task.head}." in f".{name}"].append(parameter)
    params = [{"params": groups[True], "lr": rate.lr * rate.head}, {"params": groups[False]}]
    optimizer: torch.optim.Optimizer
    if rate.optimizer == "sgd":
        optimizer = torch.optim.SGD(params, lr=rate.lr, momentum=0.9, weight_decay=1e-4, fused=True)
    else:
        optimizer = torch.optim.AdamW(params, lr=rate.lr, weight_decay=0.01, fused=True)
    steps = epochs * math.ceil(len(data.x) / task.batch)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARMUP * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    network: Callable[[Tensor], Tensor] = lambda index: model(data.x[index])  # noqa: E731
    local = None
    if family.frozen:
        local = lowcal.LoCal(
            model,
            optimizer,
            epochs=epochs,
            rule=lowcal.Frozen(),
            supervision=None,
            schedule=lowcal.Fixed({0: family.frozen}),
            norm_stats="running",
            example_inputs=data.x[:1],
        )
        network = lowcal.Cached(local, data.x) if family.cached else network
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        model.train()
        for module in model.modules():
            if family.running and isinstance(module, nn.BatchNorm2d):
                module.eval()
        losses = []
        for index in torch.randperm(len(data.x), generator=order).split(task.batch):
            loss = cross_entropy(network(index), data.y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
            losses.append(loss.item())
        if local is not None:
            local.end_epoch(sum(losses) / len(losses))
        yield


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    with torch.no_grad():
        right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(100), y.split(100), strict=True))
    return 100 * right / len(x)


def start(task: Task, seed: int, work: Path) -> nn.Module:
    """The network before fine-tuning; the seed decides its classifier."""
    torch.manual_seed(seed)
    return task.build(work)


def saved(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of results; none if it is not there."""
    return json.loads(file.read_text())["rows"] if file.exists() else []


def save(file: Path, rows: list[dict[str, Any]], task: Task | None = None) -> None:
    """Writes rows with what holds for all of them."""
    facts = {key: getattr(task, key) for key in ("images", "tests", "size", "batch")} if task else {}
    content = {**facts, "environment": gather_environment("cpu"), "rows": rows}
    atomic_write(file, (json.dumps(content, indent=1) + "\n").encode())


def pretrain(folder: Path, work: Path, *, images: int = 10_000, epochs: int = 6, batch: int = 128) -> None:
    """Trains the ViT on the even classes, with flips; writes its weights without the classifier, and what came out."""
    data = load("cifar10", data_dir=folder)
    train_images, test_images = (of_classes(part, 0) for part in (data.train, data.test))  # type: ignore[arg-type]
    train_images = subset(train_images, images, 0, "images")
    x, test_x = (part.pixels / 127.5 - 1 for part in (train_images, test_images))
    torch.manual_seed(0)
    model, begin = vit(), process_time()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, fused=True)
    steps = epochs * math.ceil(images / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.002, total_steps=steps, pct_start=WARMUP)
    for epoch in range(epochs):
        model.train()
        for index in torch.randperm(images).split(batch):
            flip = torch.rand(len(index), 1, 1, 1) < 0.5
            loss = cross_entropy(model(torch.where(flip, x[index].flip(3), x[index])), train_images.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(epoch + 1, loss.item(), f"{process_time() - begin:.0f} s", flush=True)
    facts = {"images": images, "epochs": epochs, "batch": batch, "cpu_seconds": process_time() - begin}
    facts["accuracy"] = accuracy(model, test_x, test_images.labels)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    work.mkdir(parents=True, exist_ok=True)
    torch.save(weights, work / WEIGHTS)
    facts["sha256"] = hashlib.sha256((work / WEIGHTS).read_bytes()).hexdigest()
    save(FOLDER / "vit-pretraining.json", [facts])
    print(facts)


def tune(name: str, folder: Path, work: Path) -> None:
    """Trains each family at each of its lengths and rates once, and tests on held-out training images."""
    task, file = TASKS[name], FOLDER / f"{name}-rates.json"
    rows = saved(file)
    data = read(task, folder, 0, validation=True)
    for family, settings in task.families.items():
        middle = settings.lengths[len(settings.lengths) // 2]
        for epochs in sorted(settings.lengths, key=lambda length: length != middle):
            rates = settings.rates if epochs == middle else best(task, rows, family, middle)[:2]
            for rate in rates:
                row: dict[str, Any] = {"family": family, "epochs": epochs, **rate._asdict(), "seed": 0}
                if any(row.items() <= other.items() for other in rows):
                    continue
                model = start(task, 0, work)
                for _ in train(task, settings, epochs, rate, model, data, 0):
                    pass
                row["accuracy"] = accuracy(model, data.test_x, data.test_y)
                print(row, flush=True)
                rows.append(row)
                save(file, rows, task)


def best(task: Task, rows: list[dict[str, Any]], family: str, epochs: int) -> list[Rate]:
    """The rates that the family tried at this length, the best first."""
    family = task.families[family].like or family
    tried = [row for row in rows if (row["family"], row["epochs"]) == (family, epochs)]
    tried.sort(key=lambda row: -row["accuracy"])
    return [Rate(row["optimizer"], row["lr"], row["head"]) for row in tried]


def run(name: str, folder: Path, work: Path, seeds: list[int]) -> None:
    """Trains each family at each of its lengths at the best rate, for each seed; testing is not timed."""
    task, file = TASKS[name], FOLDER / f"{name}.json"
    rates = saved(FOLDER / f"{name}-rates.json")
    arms = [(family, epochs) for family, own in task.families.items() if own.timed for epochs in own.lengths]
    for seed in seeds:
        if any(row["seed"] == seed for row in saved(file)):
            continue
        data = read(task, folder, seed, validation=False)
        models, runs, found = {}, {}, {}
        for family, epochs in arms:
            rate = best(task, rates, family, epochs)[0]
            model = models[family, epochs] = start(task, seed, work)
            runs[family, epochs] = train(task, task.families[family], epochs, rate, model, data, seed)
            row = {"family": family, "epochs": epochs, **rate._asdict(), "seed": seed}
            found[family, epochs] = row | {"seconds": 0.0, "cpu_seconds": 0.0}
        warm_up = train(task, Family((1,)), 1, Rate("sgd", 0.01), start(task, seed, work), data, seed)
        next(warm_up)
        for turn in range(max(epochs for _, epochs in arms)):
            left = [arm for arm in arms if arm[1] > turn]
            for arm in left[turn % len(left) :] + left[: turn % len(left)]:
                wall, cpu = perf_counter(), process_time()
                next(runs[arm])
                found[arm]["seconds"] += perf_counter() - wall
                found[arm]["cpu_seconds"] += process_time() - cpu
                if arm[1] == turn + 1:
                    runs.pop(arm).close()  # frees its cache
                    found[arm]["accuracy"] = accuracy(models.pop(arm), data.test_x, data.test_y)
                    print(found[arm], flush=True)
        save(file, [*saved(file), *found.values()], task)  # another process may have added its seeds


def main() -> None:
    """One of the four parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["pretrain", "tune", "run", "report"])
    parser.add_argument("network", nargs="?", choices=list(TASKS), default="efficientnet")
    parser.add_argument("--data-dir", type=Path, help="the CIFAR-10 images")
    parser.add_argument("--work", type=Path, default=Path(), help="where the weights of the ViT are")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the timed runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.part == "report":
        finetuning_report.write_all(FOLDER, RESULTS.parent / "docs" / "images")
    elif arguments.part == "pretrain":
        pretrain(arguments.data_dir, arguments.work)
    elif arguments.part == "tune":
        tune(arguments.network, arguments.data_dir, arguments.work)
    else:
        run(arguments.network, arguments.data_dir, arguments.work, arguments.seeds)


if __name__ == "__main__":
    main()
