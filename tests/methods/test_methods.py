import pytest
import torch

from lowcal import LoCal, LossTrend, LowcalError, NormTrend
from lowcal.method_settings import LocalSettings, ScheduleSettings
from lowcal.methods import build_method
from lowcal.rules import Frozen, Hebbian

from ..networks import convnet, images
from ..support import changed, sgd, train_step, weights

MOVES = ScheduleSettings(name="fixed", epochs={1: 2})


def built(name, **settings):
    model = convnet()
    optimizer = sgd(model)
    values = {"schedule": MOVES, **settings}
    method = build_method(name, model, optimizer, LocalSettings(**values), epochs=4, example_inputs=images(1)[0][0])
    return model, optimizer, method


def test_sgd_has_no_boundary():
    _, _, method = built("sgd")
    with pytest.raises(LowcalError, match="sgd trains every layer, so its boundary cannot be 2"):
        method.move_to(2)
    method.move_to(0)


def test_local_hands_its_settings_to_the_controller():
    settings = {"lr": 0.02, "decay": 0.1, "decay_every": 5, "scale": "relative", "every": 3, "norm_stats": "running"}
    _, _, method = built("local", supervision=False, **settings)
    local = method._local
    assert isinstance(local, LoCal)
    assert local.rule == Hebbian(lr=0.02, decay=0.1, decay_every=5, scale="relative", every=3)
    assert (local.norm_stats, local.supervision, local.epochs) == ("running", None, 4)
    assert method.period == 3
    assert built("local")[2]._local.supervision is not None


def test_readings_reach_the_controller():
    readings = {"spacing": "prose", "measure": "step", "average": "run", "align": "block"}
    schedule = ScheduleSettings(alpha=0.9, **readings)
    local = built("local", schedule=schedule, decay_from="switch", sign="kept")[2]._local
    assert local.schedule == NormTrend(0.9, **readings)
    assert local.rule == Hebbian(decay_from="switch")
    assert local.supervision == LossTrend(sign="kept")
    assert built("freeze", schedule=schedule)[2]._local.schedule == local.schedule
    plain = built("local", schedule=ScheduleSettings())[2]._local
    assert (plain.schedule, plain.rule, plain.supervision) == (NormTrend(), Hebbian(), LossTrend())


def test_freeze_is_the_same_boundary_without_updates():
    model, optimizer, method = built("freeze", lr=0.02, every=3)
    assert method._local.rule == Frozen()
    assert method.period == 1
    method.end_epoch(1.0)
    assert method.boundary == 2
    before = weights(model)
    for batch in images(3):
        train_step(model, optimizer, batch)
    moved = {name for name in changed(before, model) if "running" not in name and "tracked" not in name}
    assert {name.partition(".")[0] for name in moved} == {"conv3", "norm3", "head"}


def test_facts_are_of_the_epoch_that_ended():
    model, optimizer, method = built("local", lr=0.04, decay=0.5, decay_every=1)
    assert method.facts() == {"local_lr": None, "sign": None, "transition_change": None, "skipped_updates": 0}
    before = model.conv1.weight.detach().clone()
    train_step(model, optimizer, images(1)[0])
    change = float(torch.linalg.vector_norm(model.conv1.weight.detach() - before))
    method.end_epoch(1.0)
    assert method.facts() == {"local_lr": 0.04, "sign": 1, "transition_change": change, "skipped_updates": 0}
    train_step(model, optimizer, images(1)[0])
    method.end_epoch(2.0)  # the loss rose: the next epoch's sign is -1
    assert method.facts()["sign"] == 1
    train_step(model, optimizer, images(1)[0])
    method.end_epoch(1.0)
    assert method.facts()["sign"] == -1
    assert method.facts()["local_lr"] == 0.01


def test_a_network_part_that_its_user_froze_stays_frozen_in_a_twin():
    model = convnet()
    model.conv2.weight.requires_grad_(False)
    optimizer = sgd(model)
    method = build_method(
        "local", model, optimizer, LocalSettings(schedule=MOVES), epochs=4, example_inputs=images(1)[0][0]
    )
    method.move_to(1)
    copied = convnet()
    method.twin(copied, sgd(copied), images(1)[0][0])
    assert not copied.conv2.weight.requires_grad
    assert not copied.conv1.weight.requires_grad
    assert copied.conv3.weight.requires_grad
