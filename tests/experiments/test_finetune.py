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
