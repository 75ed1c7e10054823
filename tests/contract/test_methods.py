"""What every method must hold, whatever it does: one set of checks over all that are registered."""

import copy
import io
import json

import pytest
import torch
from torch import nn

from lowcal import LowcalError
from lowcal.method_settings import LocalSettings, PruneSettings, ScheduleSettings, StochasticDepthSettings
from lowcal.methods import METHODS, Method, build_method
from lowcal.models import build_model
from lowcal.steps.modes import build_step
from lowcal.steps.step import StepOptions
from lowcal.strided import slice_inputs

from ..networks import images
from ..support import hooks, same, sgd, snapshot, weights

EPOCHS = 5
MOVES = {1: 1, 3: 3}
CPU = torch.device("cpu")
FACTS = {"local_lr", "sign", "transition_change", "skipped_updates"}

OTHER_SETTINGS = {
    "stochastic_depth": StochasticDepthSettings(survival=0.4),
    "prune": PruneSettings(every=2, threshold=0.35),  # so high that channels go in this short time
}

every_method = pytest.mark.parametrize("name", METHODS)
boundary_methods = pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].section == "local"])


def network() -> nn.Module:
    return build_model("resnet8", classes=3, in_channels=2, width=4)


class Training:
    """A network in training by a method: five epochs of three steps."""

    def __init__(self, name: str, **settings):
        torch.manual_seed(3)
        self.model = network()
        self.optimizer = sgd(self.model)
        schedule = ScheduleSettings(name="fixed", epochs=MOVES)
        values = {"lr": 0.05, "schedule": schedule, **settings}
        section = METHODS[name].section if name in METHODS else None
        self.method = build_method(
            name,
            self.model,
            self.optimizer,
            OTHER_SETTINGS.get(section, LocalSettings(**values)),
            epochs=EPOCHS,
            example_inputs=images(1)[0][0],
        )

    def epoch(self, number: int) -> bool:
        step = build_step("eager", self.model, (self.optimizer,), self.method, StepOptions(CPU))
        self.model.train()
        losses = [step(*batch) for batch in images(3, seed=10 + number)]
        return self.method.end_epoch(float(torch.stack(losses).mean()))

    def learning(self) -> dict:
        """What learns by SGD, and the network's shape."""
        learns = {name: value.requires_grad for name, value in self.model.named_parameters()}
        if self.method.name == "refresh":  # opens and closes its prefix from step to step, without a new step
            learns = {"boundary": self.method.boundary}
        return {"learns": learns, "shapes": [value.shape for value in self.model.parameters()]}

    def state(self) -> dict:
        return {
            "method": self.method.state_dict(),
            "model": weights(self.model),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def load(self, state: dict) -> None:
        self.method.load_state_dict(state["method"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def saved_and_loaded(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_method
def test_it_is_registered_under_its_name(name):
    assert issubclass(METHODS[name], Method)
    assert METHODS[name].name == name
    training = Training(name)
    assert type(training.method) is METHODS[name]
    assert training.method.layers[:3] == ("stem.0", "stages.0.0.conv1", "stages.0.0.conv2")
    assert training.method.layers[-1] == "head"


def test_each_does_here_what_it_is_there_for():
    ends = {}
    for name in METHODS:
        training = Training(name)
        for number in range(EPOCHS):
            training.epoch(number)
        ends[name] = training
    assert {name: ends[name].method.boundary for name in ends if ends[name].method.boundary} == dict.fromkeys(
        ("local", "freeze", "refresh"), 3
    )
    whole = sum(parameter.numel() for parameter in network().parameters())
    assert [n for n in ends if sum(p.numel() for p in ends[n].model.parameters()) != whole] == ["prune"]
    heads = [tuple(ends[name].model.head.bias.tolist()) for name in ends]
    assert len(set(heads)) == len(METHODS)


@every_method
def test_what_holds_in_every_epoch(name):
    training = Training(name)
    keys, groups = list(training.model.state_dict()), training.optimizer.state_dict()["param_groups"]
    facts = training.method.facts().keys()
    assert facts >= FACTS
    boundaries = [training.method.boundary]
    for number in range(EPOCHS):
        learning = training.learning()
        changed = training.epoch(number)
        assert changed == (training.learning() != learning), "it says when the step must be built again"
        boundaries.append(training.method.boundary)
        assert list(training.model.state_dict()) == keys
        assert training.optimizer.state_dict()["param_groups"] == groups
        now = training.method.facts()
        assert now.keys() == facts
        assert json.loads(json.dumps(now, allow_nan=False)) == now
        training.model.eval()
        before = training.state()
        with torch.no_grad():
            training.model(images(1)[0][0])
        assert same(training.state(), before), "evaluation changes nothing"
    assert boundaries[0] == 0
    assert boundaries == sorted(boundaries)
    with pytest.raises(LowcalError):
        training.method.move_to(boundaries[-1] - 1)
    assert training.method.boundary == boundaries[-1]


@every_method
def test_its_state_goes_on_bitwise_from_any_epoch(name):
    whole = Training(name)
    for number in range(EPOCHS):
        state = saved_and_loaded(whole.state())  # tensors and plain values only, or it would not load
        assert same(state, whole.state())
        resumed = Training(name)
        resumed.load(state)
        assert same(resumed.state(), whole.state())
        assert resumed.epoch(number) == whole.epoch(number)
        assert same(resumed.state(), whole.state())
        assert same(resumed.method.facts(), whole.method.facts())


@every_method
def test_a_state_that_is_not_its_own_is_refused_and_changes_nothing(name):
    training = Training(name)
    training.epoch(0)
    before = snapshot(training.model, training.optimizer), training.method.state_dict()
    for state in ({"gates": 3}, {"format": 99}):
        with pytest.raises(LowcalError) as error:
            training.method.load_state_dict(state)
        assert "\n" not in str(error.value)
        assert same((snapshot(training.model, training.optimizer), training.method.state_dict()), before)


@every_method
@pytest.mark.parametrize("epochs", [0, EPOCHS])
def test_detach_leaves_no_hook(name, epochs):
    training = Training(name)
    for number in range(epochs):
        training.epoch(number)
    training.method.detach()
    plain = network()
    for model in (training.model, plain):
        slice_inputs(model)  # which pruning does to its network for good
    assert hooks(training.model, training.optimizer) == hooks(plain, sgd(plain))


@boundary_methods
@pytest.mark.parametrize("norm_stats", ["batch", "running"])
def test_with_boundary_zero_it_is_bitwise_sgd(name, norm_stats):
    one = Training(name, schedule=ScheduleSettings(name="fixed", epochs={}), norm_stats=norm_stats)
    two = Training("sgd")
    for number in range(EPOCHS):
        one.epoch(number)
        two.epoch(number)
        assert same(weights(one.model), weights(two.model))
        assert same(one.optimizer.state_dict(), two.optimizer.state_dict())


@every_method
def test_its_penalty_can_be_added_to_a_loss(name):
    training = Training(name)
    inputs, labels = images(1)[0]
    loss = nn.functional.cross_entropy(training.model(inputs), labels)
    penalty = training.method.penalty(loss)
    assert penalty is None or (penalty.dim() == 0 and penalty.requires_grad and penalty.isfinite())


@every_method
@pytest.mark.parametrize("epochs", [0, EPOCHS])
def test_its_twin_does_the_same_and_leaves_it_alone(name, epochs):
    training = Training(name)
    for number in range(epochs):
        training.epoch(number)
    before = snapshot(training.model, training.optimizer), training.method.state_dict()
    model, optimizer = copy.deepcopy((training.model, training.optimizer))
    twin = training.method.twin(model, optimizer, images(1)[0][0])
    assert twin.boundary == training.method.boundary
    assert same(weights(model), weights(training.model))
    if name != "refresh":  # whose twin begins a period anew
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in training.model.parameters()]
    model.train()
    step = build_step("eager", model, (optimizer,), twin, StepOptions(CPU))
    step(*images(1)[0])
    twin.detach()
    assert same((snapshot(training.model, training.optimizer), training.method.state_dict()), before)


def test_an_unknown_method_is_named_with_the_nearest():
    with pytest.raises(LowcalError, match="'freze'; did you mean 'freeze'"):
        Training("freze")
