"""An epoch's losses and skipped steps, and the evaluation of a network."""

import pytest
import torch
from torch import nn

from lowcal import LowcalError
from lowcal.training.epoch_state import DivergedError, EpochState
from lowcal.training.evaluation import evaluate

from ..networks import convnet, images
from ..support import same, weights
from .runs import make_run, spoilt

CPU = torch.device("cpu")


def steps(losses, skipped=(), sizes=None, before=0):
    """An epoch with these losses; the steps in `skipped`, counted from 1, were skipped."""
    epoch = EpochState(len(losses), CPU, in_a_row=before)
    for number, loss in enumerate(losses, start=1):
        shape = (2 if sizes is None else sizes[number - 1], 1, 2, 2)
        epoch.add(torch.tensor(loss), torch.tensor(number in skipped), shape, 0.1 * number)
    return epoch


def test_a_loss_that_is_not_finite_is_found_within_a_hundred_steps(tmp_path):
    taken = []

    def spoil(scores):
        taken.append(1)
        return scores * torch.inf if len(taken) == 130 else None

    run = make_run(tmp_path / "run", "sgd", model=spoilt(*range(400), spoil=spoil), images_count=210, checkpoint=False)
    run.train.batch = 1
    with pytest.raises(LowcalError, match="loss became nan at step 130 of epoch 1"):
        run.run_epoch()
    assert len(taken) == 200


def test_the_mean_loss_weighs_each_image_alike():
    epoch = steps([1.0, 2.0, 6.0], sizes=[2, 2, 1])
    assert epoch.mean_loss() == pytest.approx((2 * 1 + 2 * 2 + 1 * 6) / 5)
    assert (epoch.steps, epoch.images) == (3, 5)
    epoch.seconds = 2.0
    assert epoch.facts() == {
        "seconds": 2.0, "steps": 3, "step_ms": pytest.approx(200), "images_per_second": 2.5, "skipped_steps": 0
    }  # fmt: skip


def test_skipped_steps_are_counted_and_their_losses_left_out():
    epoch = steps([1.0, torch.nan, 6.0], {2}, sizes=[2, 2, 1])
    epoch.check(max_skips=1)
    epoch.seconds = 1.0
    assert epoch.mean_loss() == pytest.approx((2 * 1 + 1 * 6) / 3)
    assert epoch.facts()["skipped_steps"] == 1
    assert epoch.final_skips() == 0


@pytest.mark.parametrize(("skips", "before", "last"), [({3, 4, 5}, 0, 5), ({1, 2}, 1, 2), ({9, 10, 12}, 0, None)])
def test_too_many_skipped_steps_in_a_row_end_the_run_across_epochs_too(skips, before, last):
    epoch = steps([1.0] * 12, skips, before=before)
    if last is None:
        epoch.check(max_skips=2)
        assert epoch.final_skips() == 1
        return
    with pytest.raises(DivergedError, match=r"3 steps in a row were skipped.*guard.max_skips is 2") as error:
        epoch.check(max_skips=2)
    assert error.value.step == last


@pytest.mark.parametrize("sizes", [(12,), (5, 5, 2), (1, 11)])
def test_it_is_the_mean_over_images_whatever_the_batches(sizes):
    model = convnet()
    inputs, labels = (torch.cat(part) for part in zip(*images(3, size=4), strict=True))
    model(inputs)
    batches = list(zip(inputs.split(sizes), labels.split(sizes), strict=True))
    before = weights(model)
    loss, error = evaluate(model, batches, device=CPU, precision="float32")
    scores = model(inputs).detach().double()
    log_odds = scores - scores.exp().sum(1, keepdim=True).log()
    expected = -sum(float(row[label]) for row, label in zip(log_odds, labels, strict=True)) / 12
    wrong = sum(int(row.argmax()) != int(label) for row, label in zip(scores, labels, strict=True))
    assert loss == pytest.approx(expected, rel=1e-6)
    assert error == pytest.approx(100 * wrong / 12)
    assert 0 < wrong < 12
    assert same(weights(model), before)


def test_what_a_network_keeps_from_it_serves_in_training():
    class Caching(nn.Module):
        """Keeps its position embedding for the size it has seen last, as some networks do."""

        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[int, torch.Tensor] = {}
            self.head = nn.Linear(72, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(1)
            if len(x) not in self.kept:
                self.kept[len(x)] = torch.linspace(0, 1, x.shape[1]).expand_as(x).clone()
            return self.head(x * self.kept[len(x)])

    model = Caching()
    inputs, labels = images(1)[0]
    evaluate(model, [(inputs, labels)], device=CPU, precision="float32")
    nn.functional.cross_entropy(model(inputs), labels).backward()
    assert model.head.weight.grad is not None


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_is_near_single(precision):
    model = convnet().eval()
    batches = images(2)
    single, _ = evaluate(model, batches, device=CPU, precision="float32")
    mixed, _ = evaluate(model, batches, device=CPU, precision=precision)
    assert mixed == pytest.approx(single, rel=0.02)
    assert mixed != single
