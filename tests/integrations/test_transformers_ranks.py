"""The Trainer's DDP in two processes: the weights of one process, over two moves, and exact resume."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from transformers import TrainingArguments

import lowcal
from lowcal.integrations.transformers import LoCalTrainerCallback

from ..support import refused, same, weights
from ..world import apart
from .test_transformers import OPTIONS, resnet, train, vit

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's own advice

RULES = {"hebbian": lowcal.Hebbian(lr=0.05), "frozen": lowcal.Frozen(), "refresh": lowcal.Refresh(every=2)}


def run(folder, rule, batch, resume=None, network=vit, **options):
    model, own = network(), LoCalTrainerCallback(**{**OPTIONS, "rule": RULES[rule]})
    train(folder, model, own, resume, per_device_train_batch_size=batch, **options)
    assert own.local.history == ((1, 1), (3, 2))
    return [weights(model), own.local.state_dict()["losses"]]


def half(folder, name, options, *arguments):
    """A process's part of a run."""
    found = run(folder / "run", *arguments, **options)
    torch.save(found, folder / f"{name}-{torch.distributed.get_rank()}.pt")


def found(folder, name):
    """The first process's weights and losses; the running statistics of the others are not used."""
    first, second = (torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1))
    parts = [
        [{key: value for key, value in state.items() if "running" not in key}, own] for state, own in (first, second)
    ]
    assert same(*parts), "the ranks differ"
    return first


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_equal_to_one_process(rule, accumulate, tmp_path):
    """With accumulation the last step of an epoch has fewer mini-batches."""
    options = {"gradient_accumulation_steps": accumulate}
    assert apart(2, half, tmp_path, "two", options, rule, 2) == [0, 0]
    state, losses = found(tmp_path, "two")
    whole, all_losses = run(tmp_path, rule, 4, **options)
    # The model divides by the number of images of all ranks, and the Trainer multiplies by the number of ranks.
    trend, all_trend = ([loss / own[0] for loss in own] for own in (losses, all_losses))
    torch.testing.assert_close(trend, all_trend, rtol=1e-5, atol=1e-6)
    for name, value in whole.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    transformers.__version__.startswith("5.0."), reason="its Trainer cannot resume in processes on CPUs"
)
def test_resumes_exactly_in_the_middle_of_an_epoch(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "network": resnet}
    assert apart(2, half, tmp_path, "whole", options, "hebbian", 2) == [0, 0]
    folder = str(tmp_path / "run" / "checkpoint-8")
    assert apart(2, half, tmp_path, "resumed", options, "hebbian", 2, folder) == [0, 0]
    assert same(found(tmp_path, "resumed")[0], found(tmp_path, "whole")[0])


MISTAKES = {
    "ddp_find_unused_parameters=False": {"ddp_find_unused_parameters": False},
    "ddp_static_graph": {"ddp_static_graph": True},
    "gradient_checkpointing": {"gradient_checkpointing": True},
}


def mistaken(folder):
    for said, options in MISTAKES.items():
        if not hasattr(TrainingArguments, *options):  # the oldest host has no static graph
            continue
        with refused(said, "leave it out, or train in one process"):
            run(folder, "hebbian", 2, **options)


def test_mistakes(tmp_path):
    assert apart(2, mistaken, tmp_path) == [0, 0]
