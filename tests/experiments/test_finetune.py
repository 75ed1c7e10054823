"""The settings of fine-tuning: which layers are frozen, the optimizer, the classifier's rate, smoothed labels."""

import pytest
import torch
import torch.nn.functional as F

from lowcal import LowcalError
from lowcal.experiments.assemble import build_run, check, load_data
from lowcal.experiments.recipe_text import apply_settings, load_recipe

CPU = torch.device("cpu")
SMALL = ["model.width=4", "data.train_images=40", "data.test_images=20", "batch=20", "epochs=2", "step=eager"]


def recipe(*settings):
    return apply_settings(load_recipe("digits"), [*SMALL, *settings])


@pytest.fixture(scope="module")
def data():
    return load_data(recipe(), None)


def run(tmp_path, data, method, *settings):
    return build_run(recipe(*settings), method=method, folder=tmp_path / "run", data=data, device=CPU)


@pytest.mark.parametrize(
    ("frozen", "boundary"), [("3", 3), ("0.5", 5), ("stages.0", 3), ("stages.1.0.conv1", 4), ("0", 0)]
)
def test_layers_frozen_from_the_start(tmp_path, data, frozen, boundary):
    """Ten layers: a stem, three, three and two in blocks, shortcuts among them, and a classifier."""
    frozen_run = run(tmp_path, data, "freeze", f"model.frozen={frozen}", "local.schedule={name: fixed, epochs: {}}")
    assert frozen_run.method.boundary == boundary
    before = {name: value.clone() for name, value in frozen_run.model.named_parameters()}
    record = frozen_run.run_epoch()
    assert record["boundary"] == boundary
    still = [name for name, value in frozen_run.model.named_parameters() if torch.equal(value, before[name])]
    assert bool(still) == (boundary > 0)


def test_other_methods_train_all_layers(tmp_path, data):
    sgd = run(tmp_path, data, "sgd", "model.frozen=5")
    assert sgd.method.boundary == 0
    assert all(parameter.requires_grad for parameter in sgd.model.parameters())


@pytest.mark.parametrize(
    ("frozen", "message"),
    [("stage.0", "model.frozen=stage.0: no layer has this name"), ("10", "cannot move to 10"), ("true", "must be")],
)
def test_a_wrong_part_is_named(data, frozen, message):
    with pytest.raises(LowcalError) as error:
        check(recipe(f"model.frozen={frozen}"), ["freeze"], data, CPU)
    assert message in str(error.value)


def test_adamw_with_a_rate_of_its_own_for_the_classifier(tmp_path, data):
    settings = ["optimizer.name=adamw", "optimizer.head_lr=10", "optimizer.lr=0.001", "lr_schedule.name=constant"]
    tuned = run(tmp_path, data, "sgd", *settings)
    assert isinstance(tuned.optimizer, torch.optim.AdamW)
    first = {name: value.clone() for name, value in tuned.model.named_parameters()}
    tuned.run_epoch()
    assert [group["lr"] for group in tuned.optimizer.param_groups] == [0.001, pytest.approx(0.01)]
    moved = {name: (value - first[name]).abs().mean() for name, value in tuned.model.named_parameters()}
    assert moved["head.weight"] > 4 * moved["stem.0.weight"]  # AdamW's steps have about the length of the rate


def test_smoothed_labels_and_clipped_gradients_reach_the_step(tmp_path, data):
    """The recorded loss is the smoothed one, and no step is longer than the clipped gradient allows."""
    clipped = run(
        tmp_path, data, "sgd", "label_smoothing=0.3", "optimizer.max_norm=0.001", "optimizer.momentum=0",
        "optimizer.weight_decay=0", "optimizer.lr=1.0", "lr_schedule.name=constant",
    )  # fmt: skip
    before = torch.cat([p.detach().clone().flatten() for p in clipped.model.parameters()])
    loss = clipped.run_epoch()["train_loss"]
    moved = (torch.cat([p.detach().flatten() for p in clipped.model.parameters()]) - before).norm()
    assert 0 < moved <= 0.001 * 2 * 1.001  # two steps
    torch.manual_seed(0)
    scores, labels = torch.zeros(4, 10), torch.arange(4)
    assert loss > F.cross_entropy(scores, labels, label_smoothing=0.3) * 0.5


def test_a_run_with_adamw_resumes_exactly(tmp_path, data):
    settings = ["optimizer.name=adamw", "optimizer.head_lr=3", "optimizer.lr=0.001", "epochs=3"]
    whole = run(tmp_path / "a", data, "freeze", "model.frozen=3", *settings)
    parts = run(tmp_path / "b", data, "freeze", "model.frozen=3", *settings)
    while not whole.done:
        whole.run_epoch()
    parts.run_epoch()
    again = build_run(
        recipe("model.frozen=3", *settings), method="freeze", folder=tmp_path / "b/run", data=data, device=CPU,
        reopen=True,
    )  # fmt: skip
    again.resume()
    while not again.done:
        again.run_epoch()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


ALL = [
    "ema=0.9", "data.mixup=0.2", "data.cutmix=1.0", "data.augment=randaugment", "data.ra_magnitude=7", "data.ra_ops=1",
    "data.random_erase=0.25", "data.workers=0", "label_smoothing=0.1", "lr_schedule.warmup_epochs=0.5",
]  # fmt: skip


@pytest.mark.parametrize("method", ["sgd", "local", "freeze", "refresh", "stochastic-depth"])
def test_every_method_trains_with_all_of_fine_tuning(tmp_path, method):
    chosen = recipe(*ALL)
    tuned = load_data(chosen, None)
    check(chosen, [method], tuned, CPU)
    trained = build_run(chosen, method=method, folder=tmp_path / "run", data=tuned, device=CPU)
    first = {name: value.clone() for name, value in trained.model.named_parameters()}
    while not trained.done:
        trained.run_epoch()
    assert any(not torch.equal(value, first[name]) for name, value in trained.model.named_parameters())
    trained.finish()
    exported = torch.load(tmp_path / "run/model.pt")
    mean = trained.state.train.mean.state_dict()["tensors"]
    assert all(torch.equal(exported[name], value) for name, value in mean.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("ema=1", "ema=1: must be a number, at least 0 and below 1"),
        ("ema.decay=-0.1", "ema=-0.1: must be"),
        ("data.mixup=-1", "data.mixup=-1: must be a number, at least 0"),
        ("data.cutmix=x", "data.cutmix=x: must be a number"),
        ("data.ra_magnitude=31", "data.ra_magnitude=31: must be a whole number, at least 0 and at most 30"),
        ("data.random_erase=1.5", "data.random_erase=1.5: must be"),
        ("data.augment=randaug", "data.augment=randaug: must be true or false, 'randaugment' or 'trivial'"),
        ("lr_schedule.warmup_epochs=2", "lr_schedule.warmup_epochs=2: must be below epochs, which is 2"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(LowcalError) as error:
        recipe(settings)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("settings", "method", "message"),
    [
        (["ema=0.9"], "prune", "ema=0.9: prune removes channels"),
        (["cache=memory", "data.mixup=0.2"], "freeze", "--set data.mixup=0 --set data.cutmix=0"),
        (["cache=memory", "data.augment=trivial"], "freeze", "--set data.augment=false"),
        (["cache=memory", "data.augment=false", "data.random_erase=0.1"], "freeze", "--set data.random_erase=0"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(settings, method, message):
    chosen = recipe(*settings, "local.norm_stats=running")
    with pytest.raises(LowcalError) as error:
        check(chosen, [method], load_data(chosen, None), CPU)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
