"""The user's objects stay theirs: no hook after detach, copies that feed nothing back, the same state_dict keys."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch

import lowcal

from .networks import Residual, convnet, images
from .support import OPTIMIZERS, changed, hooks, same, sgd, train_step, weights


def controller(model, optimizer=None, *, boundary=2, example=True, **options):
    inputs = images(1)[0][0]
    local = lowcal.LoCal(
        model, optimizer or sgd(model), epochs=9, example_inputs=inputs if example else None, **options
    )
    if not example:
        model(inputs)
    local.move_to(boundary)
    return local


OPTIONS = [
    {"rule": lowcal.Hebbian()},
    {"rule": lowcal.Frozen()},
    {"norm_stats": "running"},
    {"example": False},
    {"boundary": 0},
]


@pytest.mark.parametrize(
    ("way", "options"),
    [*(("detach", options) for options in OPTIONS), *((way, {}) for way in ("twice", "context", "context and error"))],
    ids=str,
)
def test_detach_leaves_no_hook(way, options):
    model = Residual()
    optimizer = sgd(model)
    before = hooks(model, optimizer)
    grad_before = {name: p.requires_grad for name, p in model.named_parameters()}
    local = controller(model, optimizer, **options)
    train_step(model, optimizer, images(1)[0])
    local.move_to(3)
    train_step(model, optimizer, images(1)[0])
    if way.startswith("detach") or way == "twice":
        local.detach()
        if way == "twice":
            local.detach()
    elif way == "context":
        with local as entered:
            assert entered is local
    else:
        with pytest.raises(KeyError), local:
            raise KeyError
    assert hooks(model, optimizer) == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grad_before


def test_a_controller_that_never_saw_a_forward_detaches_too():
    model = convnet()
    optimizer = sgd(model)
    before = hooks(model, optimizer)
    lowcal.LoCal(model, optimizer, epochs=9).detach()
    assert hooks(model, optimizer) == before


def test_after_detach_training_is_plain_again():
    model = convnet()
    optimizer = sgd(model)
    with controller(model, optimizer):
        train_step(model, optimizer, images(1)[0])
    plain, plain_optimizer = copy.deepcopy((model, optimizer))
    for batch in images(3, seed=4):
        train_step(model, optimizer, batch)
        train_step(plain, plain_optimizer, batch)
    assert same(weights(model), weights(plain))


def test_a_second_detach_leaves_a_later_controller_and_the_user_alone():
    model = convnet()
    optimizer = sgd(model)
    first = controller(model, optimizer, norm_stats="running")
    train_step(model, optimizer, images(1)[0])
    first.detach()
    model.norm1.eval()
    second = controller(model, optimizer)
    before = hooks(model, optimizer)
    grad_before = {name: p.requires_grad for name, p in model.named_parameters()}
    first.detach()
    assert hooks(model, optimizer) == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grad_before
    assert not model.norm1.training
    with pytest.raises(lowcal.LowcalError, match="another LoCal"):
        lowcal.LoCal(model, optimizer, epochs=9)
    second.detach()
    lowcal.LoCal(model, optimizer, epochs=9).detach()


def test_an_update_in_waiting_is_not_applied_after_detach():
    model = convnet()
    optimizer = sgd(model)
    local = controller(model, optimizer)
    model(images(1)[0][0]).sum().backward()
    before = weights(model)
    local.detach()
    optimizer.step()
    assert not {"conv1.weight", "conv2.weight"} & changed(before, model)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_hooks_die_with_the_controller(options):
    model = Residual()
    optimizer = sgd(model)
    before = hooks(model, optimizer)
    local = controller(model, optimizer, **options)
    train_step(model, optimizer, images(1)[0])
    gone = weakref.ref(local)
    del local
    gc.collect()
    assert gone() is None
    assert hooks(model, optimizer) == before
    lowcal.LoCal(model, optimizer, epochs=9).detach()  # the layers are free again


def test_the_controller_does_not_outlive_its_model():
    model = convnet()
    optimizer = sgd(model)
    local = controller(model, optimizer)
    train_step(model, optimizer, images(1)[0])
    gone = weakref.ref(model)
    del model, optimizer, local
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_classes_keys_and_groups_stay(options):
    model = Residual()
    optimizer = sgd(model)
    keys, groups = list(model.state_dict()), copy.deepcopy(optimizer.state_dict()["param_groups"])
    classes = [type(module) for module in model.modules()]
    held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    local = controller(model, optimizer, **options)
    for boundary in range(local.boundary, 6):
        local.move_to(boundary)
        train_step(model, optimizer, images(1)[0])
        assert list(model.state_dict()) == keys
        assert [type(module) for module in model.modules()] == classes
        assert optimizer.state_dict()["param_groups"] == groups
        assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == held


def through_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


def through_file(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    ("options", "duplicate"),
    [*((options, copy.deepcopy) for options in OPTIONS), ({}, through_pickle), ({}, through_file)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_copy_of_the_model_works_and_feeds_nothing_back(options, duplicate):
    """Copied at every point of a step, trained by itself: the original ends bitwise where it ends without copies."""
    states = []
    for copying in (False, True):
        torch.manual_seed(2)
        model = Residual()
        optimizer = sgd(model)
        local = controller(model, optimizer, **options)
        for inputs, labels in images(2):

            def meddle():
                if copying:  # noqa: B023
                    twin = duplicate(model)  # noqa: B023
                    assert same(weights(twin), weights(model))  # noqa: B023
                    other = sgd(twin)
                    for batch in images(2, seed=8):
                        train_step(twin, other, batch)
                    twin.eval()(images(1)[0][0])

            meddle()
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
            meddle()
            optimizer.zero_grad()
            loss.backward()
            meddle()
            optimizer.step()
        states.append((weights(model), optimizer.state_dict(), local.state_dict()))
    assert same(*states)


def test_a_copied_pair_of_model_and_optimizer_leaves_the_original_alone():
    model = convnet(norm=False)
    optimizer = sgd(model)
    local = controller(model, optimizer)
    train_step(model, optimizer, images(1)[0])
    loss = torch.nn.functional.cross_entropy(model(images(1)[0][0]), images(1)[0][1])
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    before = weights(model)
    for batch in images(2, seed=8):
        train_step(twin, twin_optimizer, batch)
    assert not changed(before, model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert {"conv1.weight", "conv2.weight"} <= changed(before, model)  # its own updates were still there
    assert int(local._local_layers.updates.skipped) == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_makes_a_round_trip_after_moves(name):
    model = convnet()
    optimizer = OPTIMIZERS[name](model.parameters())
    local = controller(model, optimizer, boundary=0, rule=lowcal.Frozen())
    for boundary in (0, 1, 3):
        local.move_to(boundary)
        for batch in images(2, seed=boundary):
            train_step(model, optimizer, batch)
    twin = convnet()
    twin.load_state_dict(model.state_dict())
    twin_optimizer = OPTIMIZERS[name](twin.parameters())
    twin_optimizer.load_state_dict(through_file(optimizer.state_dict()))
    other = controller(twin, twin_optimizer, boundary=3, rule=lowcal.Frozen())
    for batch in images(3, seed=5):
        train_step(model, optimizer, batch)
        train_step(twin, twin_optimizer, batch)
    assert same(weights(model), weights(twin))
    assert same(optimizer.state_dict(), twin_optimizer.state_dict())
    assert len(optimizer.state) == 2 == len(twin_optimizer.state)  # weight and bias of the classifier
    assert other.boundary == 3


def test_a_saved_optimizer_with_momentum_for_layers_now_local_does_no_harm():
    model = convnet()
    optimizer = sgd(model)
    train_step(model, optimizer, images(1)[0])
    saved = copy.deepcopy(optimizer.state_dict())
    controller(model, optimizer, rule=lowcal.Frozen())
    optimizer.load_state_dict(saved)
    before = weights(model)
    train_step(model, optimizer, images(1)[0])
    assert not [n for n in changed(before, model) if n in ("conv1.weight", "conv1.bias", "conv2.weight", "norm1.bias")]
