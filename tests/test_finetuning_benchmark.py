"""benchmarks/finetuning.py: what is trained, and the arithmetic of its report."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import ttest_rel
from torch import nn

import finetuning
import finetuning_report
from finetuning_arms import TASKS, Family, Rate

TASK = replace(TASKS["vit"], batch=4, head="2")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Linear(8, 5))


@pytest.fixture
def data():
    torch.manual_seed(1)
    return finetuning.Data(torch.randn(10, 3, 2, 2), torch.arange(10) % 5, torch.randn(4, 3, 2, 2), torch.zeros(4))


def trained(data, family, rate):
    model = network()
    for _ in finetuning.train(TASK, family, 2, rate, model, data, seed=0):
        pass
    return model.state_dict()


def test_frozen_layers_keep_their_weights_and_the_cache_changes_nothing(data):
    plain, cached = (trained(data, Family((2,), frozen=1, cached=cached), Rate("sgd", 0.1)) for cached in (False, True))
    start = network().state_dict()
    assert torch.equal(plain["1.weight"], start["1.weight"])
    assert not torch.equal(plain["2.weight"], start["2.weight"])
    for name in start:
        torch.testing.assert_close(plain[name], cached[name])


def test_the_head_has_its_own_rate(data):
    same, higher = (trained(data, Family((2,)), Rate("adamw", 1e-3, head)) for head in (1, 10))
    moved = [(w["2.bias"] - network().state_dict()["2.bias"]).norm() for w in (same, higher)]
    assert moved[1] > 5 * moved[0]


def rows(family, epochs, accuracies, seconds):
    rate = {"optimizer": "sgd", "lr": 0.1, "head": 1.0}
    return [
        {"family": family, "epochs": epochs, **rate, "seed": seed, "accuracy": a, "seconds": s, "cpu_seconds": s}
        for seed, (a, s) in enumerate(zip(accuracies, seconds, strict=True))
    ]


def test_parts_are_compared_with_the_best_length_and_with_the_same_time():
    measured = [
        *rows("all layers", 2, (50, 51, 52), (40, 41, 42)),
        *rows("all layers", 8, (60, 61, 62), (160, 164, 168)),
        *rows("frozen", 4, (61, 63, 62), (41, 40, 42)),
        *rows("probe", 4, (55, 56, 55), (4, 4, 4)),
    ]
    found = finetuning_report.compare(finetuning_report.arms_of(measured))
    frozen, probe = (row for row in found if row["family"] != "all layers")
    assert (frozen["best"], frozen["rival"], probe["rival"]) == (8, 2, 2)
    assert frozen["best_gain"] == pytest.approx(1)
    assert frozen["best_p"] == pytest.approx(ttest_rel((61, 63, 62), (60, 61, 62)).pvalue)
    assert frozen["rival_gain"] == pytest.approx(11)
    assert frozen["speedup"] == pytest.approx((160 / 41 + 164 / 40 + 168 / 42) / 3)
    halves, parts = [math.log(80), math.log(82), math.log(84)], [math.log(41), math.log(40), math.log(42)]
    assert frozen["p_2"] == pytest.approx(ttest_rel(halves, parts).pvalue)
    assert [row["family"] for row in finetuning_report.reaching(found)] == ["frozen"]
    assert "+11.0 (p = " in finetuning_report.table(found).markdown()
