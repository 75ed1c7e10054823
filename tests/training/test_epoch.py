import time

import pytest
import torch

from lowcal.data import Batches, Images
from lowcal.training.epoch import train_epoch
from lowcal.training.part import DivergedError, Part

CPU = torch.device("cpu")


def batches(count: int) -> Batches:
    images = Images(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64))
    return Batches(images, batch=2, mean=(0.0,), std=(1.0,))


class Step:
    """A step that only gives the losses of `losses`, and says that it skipped those of `skipped`, counted from 1."""

    def __init__(self, losses, skipped=()):
        self.losses, self.taken, self.skips, self.skipped = losses, 0, skipped, None

    def __call__(self, *given):
        self.taken += 1
        self.skipped = torch.tensor(self.taken in self.skips)
        return torch.tensor(self.losses(self.taken))


def trained(step, count, part=None, **options):
    loader = batches(count)
    part = Part(len(loader), CPU) if part is None else part
    train_epoch(step, loader, part, device=CPU, epoch=0, epochs=1, boundary=0, layers=1, **options)
    return part


def test_a_loss_that_is_not_finite_is_found_within_a_hundred_steps():
    step = Step(lambda number: torch.inf if number == 130 else 1.0)
    with pytest.raises(DivergedError, match="loss became inf") as error:
        trained(step, 600)
    assert error.value.step == 130
    assert step.taken == 200


def test_the_mean_loss_weighs_each_image_alike():
    part = trained(Step([0.0, 1.0, 2.0, 6.0].__getitem__), 5)
    assert part.mean_loss() == pytest.approx((2 * 1 + 2 * 2 + 1 * 6) / 5)
    assert (part.steps, part.images) == (3, 5)
    assert dict(part.shape_counts()) == {(2, 1, 2, 2): 2, (1, 1, 2, 2): 1}
    assert 0 < part.facts()["step_ms"] < 1000 * part.seconds


def test_skipped_steps_are_counted_and_their_losses_left_out():
    part = trained(Step([0.0, 1.0, torch.nan, 6.0].__getitem__, {2}), 5, max_skips=1)
    assert part.mean_loss() == pytest.approx((2 * 1 + 1 * 6) / 3)
    assert part.facts()["skipped_steps"] == 1
    assert part.in_a_row() == 0


@pytest.mark.parametrize(("skips", "before", "last"), [({3, 4, 5}, 0, 5), ({1, 2}, 1, 2), ({9, 10, 12}, 0, None)])
def test_too_many_skipped_steps_in_a_row_end_the_run_across_epochs_too(skips, before, last):
    step, part = Step(lambda number: 1.0, skips), Part(12, CPU, in_a_row=before)
    if last is None:
        assert trained(step, 24, part, max_skips=2).in_a_row() == 1
        return
    with pytest.raises(DivergedError, match=r"3 steps in a row were skipped.*guard.max_skips is 2") as error:
        trained(step, 24, part, max_skips=2)
    assert error.value.step == last


def test_time_in_pauses_is_not_counted():
    class Pause:
        calls = 0

        def is_due(self):
            return True

        def __call__(self):
            self.calls += 1
            time.sleep(0.1)

    pause = Pause()
    part = trained(Step(lambda number: 1.0), 6, pause=pause)
    assert pause.calls == 3
    assert part.seconds < 0.1
