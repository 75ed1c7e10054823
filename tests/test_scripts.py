"""Loops of the shape of timm's and torchvision's training scripts, with LoCal's lines where docs/loops.md puts them."""

from contextlib import nullcontext
from functools import partial

import numpy
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.ops._utils import split_normalization_params
from torchvision.transforms.v2 import MixUp

import lowcal

from .support import same, weights

EPOCHS, BATCHES, SIZE = 4, 3, 32
MOVES = {1: 2, 2: 4}


def pictures(count, classes=3):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 3, SIZE, SIZE, generator=generator), torch.randint(classes, (4,), generator=generator))
        for _ in range(count)
    ]


class Kept:
    """What a run leaves: weights and their average, and for each epoch the parameters that learned no more."""

    def __init__(self, model, optimizer, closed=None):
        self.model, self.optimizer, self.given = model, optimizer, closed
        self.closed, self.steps = [], []
        self.first = next(module for module in model.modules() if isinstance(module, nn.Conv2d)).weight

    def watch_steps(self):
        """Lengths of the steps of the first layer's weight, local updates included."""
        last = [self.first.detach().clone()]

        def after(*_):
            self.steps.append(float((self.first.detach() - last[0]).norm()))
            last[0] = self.first.detach().clone()

        self.optimizer.register_step_post_hook(after)

    def end_epoch(self):
        names = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        self.closed.append(names)
        for name, parameter in self.model.named_parameters() if self.given else ():
            if name in self.given[len(self.closed) - 1]:
                parameter.requires_grad_(False).grad = None
                self.optimizer.state.pop(parameter, None)


def like_timm(moves=None, closed=None, *, rule=None, amp=None, accumulate=1, mixup=False, clip=None, options=()):
    """timm's train.py: a task that holds the network, its EMA, NativeScaler, accumulation by `need_update`."""
    tasks = pytest.importorskip("timm.task")
    import timm.loss
    import timm.optim
    import timm.scheduler

    torch.manual_seed(0)
    torch._dynamo.reset()
    model = timm.create_model("test_resnet", num_classes=3, drop_path_rate=0.1)
    if "channels_last" in options:
        model.to(memory_format=torch.channels_last)
    loss_function = timm.loss.SoftTargetCrossEntropy() if mixup else nn.CrossEntropyLoss()
    task = tasks.ClassificationTask(model, loss_function, verbose=False)
    mix = timm.data.Mixup(mixup_alpha=0.8, num_classes=3, label_smoothing=0.1) if mixup else None
    batches = pictures(BATCHES)
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.05, momentum=0.9, weight_decay=1e-4)
    scaler = timm.utils.NativeScaler(device="cpu") if amp is torch.float16 else None
    task.setup_ema(decay=0.9)
    if "compile" in options:
        task.compile(backend="aot_eager")
        model = task.get_trainable_module()
    updates = -(-len(batches) // accumulate)
    scheduler, epochs = timm.scheduler.create_scheduler_v2(
        optimizer, "cosine", num_epochs=EPOCHS, warmup_epochs=1, warmup_lr=0.01, updates_per_epoch=updates
    )
    local = None
    if moves is not None:
        local = lowcal.LoCal(model, optimizer, epochs=epochs, rule=rule, schedule=lowcal.Fixed(moves))
    kept = Kept(task.get_trainable_module() if "compile" not in options else model._orig_mod, optimizer, closed)
    if rule and rule.collects:
        kept.watch_steps()
    done = 0
    for epoch in range(epochs):
        torch.manual_seed(epoch)
        numpy.random.seed(epoch)  # of mixup
        task.get_trainable_module().train()
        meter = timm.utils.AverageMeter()
        optimizer.zero_grad()
        accum = accumulate
        for index, (image, target) in enumerate(batches):
            last = index == len(batches) - 1
            need_update = last or (index + 1) % accumulate == 0
            if index >= len(batches) - len(batches) % accumulate:
                accum = len(batches) % accumulate
            if mix is not None:
                image, target = mix(image, target)
            if "channels_last" in options:
                image = image.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", amp) if amp else nullcontext():
                loss = task(image, target)["loss"]
            if accum > 1:
                loss /= accum
            parameters = task.get_clip_parameters(exclude_head=False)
            if scaler is not None:
                scaler(loss, optimizer, clip_grad=clip, parameters=parameters, need_update=need_update)
            else:
                loss.backward()
                if need_update:
                    if clip is not None:
                        timm.utils.dispatch_clip_grad(parameters, value=clip, mode="norm")
                    optimizer.step()
            meter.update(loss.item() * accum, len(image))
            if not need_update:
                continue
            done += 1
            optimizer.zero_grad()
            task.update_ema(step=done)
            scheduler.step_update(num_updates=done, metric=meter.avg)
        if local is not None:
            local.end_epoch(meter.avg)
        kept.end_epoch()
        scheduler.step(epoch + 1)
    kept.weights, kept.ema = weights(kept.model), weights(task.get_trainable_module(ema=True).module)
    return kept


def like_torchvision(moves=None, closed=None, *, rule=None, amp=None, mixup=False, clip=None, options=()):
    """torchvision's references/classification/train.py: zero_grad after forward, GradScaler, averaged weights."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = RegNet(BlockParams([1, 1, 1], [8, 16, 16], [8, 8, 8], [1.0, 1.0, 1.0], [2, 2, 1]), num_classes=3)
    if "channels_last" in options:
        model.to(memory_format=torch.channels_last)
    norms, others = split_normalization_params(model)
    optimizer = torch.optim.SGD(
        [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": 1e-4}],
        lr=0.05, momentum=0.9, nesterov=True,
    )  # fmt: skip
    scaler = torch.amp.GradScaler("cpu") if amp else None
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=1)
    main = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS - 1)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, main], milestones=[1])
    mix = MixUp(num_classes=3, alpha=0.2) if mixup else None
    local = None
    if moves is not None:
        local = lowcal.LoCal(model, optimizer, epochs=EPOCHS, rule=rule, schedule=lowcal.Fixed(moves))
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    kept = Kept(model, optimizer, closed)
    if rule and rule.collects:
        kept.watch_steps()
    if "compile" in options:
        model = torch.compile(model, backend="aot_eager")

    def train_one_epoch(epoch):
        model.train()
        total = 0.0
        for index, (image, target) in enumerate(pictures(BATCHES)):
            if mix is not None:
                image, target = mix(image, target)
            if "channels_last" in options:
                image = image.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", amp or torch.float16, enabled=scaler is not None):
                loss = nn.functional.cross_entropy(model(image), target, label_smoothing=0.1)
            optimizer.zero_grad()
            if scaler is not None:
                scaler.scale(loss).backward()
                if clip is not None:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
            if index % 2 == 0:
                ema.update_parameters(model if "compile" not in options else model._orig_mod)
                if epoch < 1:
                    ema.n_averaged.fill_(0)
            total += loss.item()
        return total / BATCHES

    for epoch in range(EPOCHS):
        torch.manual_seed(epoch)
        loss = train_one_epoch(epoch)
        if local is not None:
            local.end_epoch(loss)
        kept.end_epoch()
        scheduler.step()
    kept.weights, kept.ema = weights(kept.model), weights(ema)
    return kept


SCRIPTS = {"timm": like_timm, "torchvision": like_torchvision}
SETTINGS = {
    "plain": {},
    "mixup": {"mixup": True, "clip": 1.0},
    "float16": {"amp": torch.float16, "clip": 1.0},
    "channels last": {"options": ("channels_last",)},
    "compile": {"options": ("compile",)},
}
CASES = [(script, setting) for script in SCRIPTS for setting in SETTINGS]
CASES += [("timm", "accumulation"), ("timm", "bfloat16")]
EAGER = [case for case in CASES if case[1] != "compile"]  # compiling takes long
SETTINGS |= {
    "accumulation": {"accumulate": 2, "clip": 1.0, "amp": torch.float16},
    "bfloat16": {"amp": torch.bfloat16},
}


@pytest.fixture(autouse=True)
def _hooks_are_seen(monkeypatch):
    if torch.__version__ < "2.13":
        monkeypatch.setattr(torch._dynamo.config, "skip_nnmodule_hook_guards", False)


@pytest.mark.parametrize(("script", "setting"), EAGER)
def test_boundary_0_is_bitwise_the_script(script, setting):
    run = partial(SCRIPTS[script], **SETTINGS[setting])
    without, controlled = run(), run({99: 1}, rule=lowcal.Hebbian())
    assert same(without.weights, controlled.weights)
    assert same(without.ema, controlled.ema)


@pytest.mark.parametrize(("script", "setting"), EAGER)
def test_two_moves_are_bitwise_the_script_with_layers_frozen_by_hand(script, setting):
    run = partial(SCRIPTS[script], **SETTINGS[setting])
    controlled = run(MOVES, rule=lowcal.Frozen())
    sizes = [len(names) for names in controlled.closed]
    assert 0 < sizes[0] < sizes[1] == sizes[2] == sizes[3]
    by_hand = run(closed=controlled.closed)
    assert same(by_hand.weights, controlled.weights)
    assert same(by_hand.ema, controlled.ema)


@pytest.mark.parametrize(("script", "setting"), CASES)
def test_local_updates_have_their_length_in_each_step(script, setting):
    kept = SCRIPTS[script](MOVES, rule=lowcal.Hebbian(lr=0.02), **SETTINGS[setting])
    updates = 2 if setting == "accumulation" else BATCHES
    assert kept.steps[-2 * updates :] == pytest.approx([0.02] * 2 * updates, rel=1e-3)  # of the epochs after both moves
