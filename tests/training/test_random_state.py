import pytest
import torch

from lowcal import LowcalError
from lowcal.training.random_state import RandomState

CPU = torch.device("cpu")


def draw(state: RandomState) -> float:
    with state.entered():
        return float(torch.rand(()))


def test_each_draws_as_if_it_were_alone():
    alone = RandomState(1, CPU)
    expected = [draw(alone) for _ in range(4)]
    one, two = RandomState(1, CPU), RandomState(2, CPU)
    drawn = []
    for _ in range(4):
        drawn.append(draw(one))
        draw(two)
        torch.rand(3)
    assert drawn == expected


def test_the_global_generator_is_given_back_after_an_error_too():
    before = torch.get_rng_state()

    def interrupted():
        with RandomState(1, CPU).entered():
            torch.rand(5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(torch.get_rng_state(), before)


def test_it_goes_on_from_its_state():
    one, two = RandomState(1, CPU), RandomState(2, CPU)
    draw(one)
    two.load_state_dict(one.state_dict())
    assert draw(one) == draw(two)


@pytest.mark.parametrize("state", [{}, {"cpu": 3}, {"cpu": torch.zeros(5)}, {"cpu": torch.zeros(5, dtype=torch.uint8)}])
def test_a_damaged_state_is_refused_and_changes_nothing(state):
    one, two = RandomState(1, CPU), RandomState(1, CPU)
    with pytest.raises(LowcalError, match="random generator 'cpu' is missing or damaged"):
        one.load_state_dict(state)
    assert draw(one) == draw(two)
