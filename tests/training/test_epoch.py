import pytest
import torch

from lowcal.data import Batches, Images
from lowcal.training.epoch import DivergedError, train_epoch

CPU = torch.device("cpu")


def batches(count: int) -> Batches:
    images = Images(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64))
    return Batches(images, batch=2, mean=(0.0,), std=(1.0,))


def trained(step, count):
    return train_epoch(step, batches(count), device=CPU, epoch=0, epochs=1, boundary=0, layers=1, progress=None)


def test_a_loss_that_is_not_finite_is_found_within_a_hundred_steps():
    taken = []

    def step(images, labels):
        taken.append(len(images))
        return torch.tensor(torch.inf if len(taken) == 130 else 1.0)

    with pytest.raises(DivergedError) as error:
        trained(step, 600)
    assert (error.value.loss, error.value.step) == (torch.inf, 130)
    assert len(taken) == 200


def test_the_mean_loss_weighs_each_image_alike():
    losses = iter((1.0, 2.0, 6.0))
    result = trained(lambda images, labels: torch.tensor(next(losses)), 5)
    assert result.loss == pytest.approx((2 * 1 + 2 * 2 + 1 * 6) / 5)
    assert (result.steps, result.images) == (3, 5)
    assert dict(result.shapes) == {(2, 1, 2, 2): 2, (1, 1, 2, 2): 1}
    assert 0 < result.step_ms < 1000 * result.seconds
