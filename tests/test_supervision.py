"""Algorithm 2: the direction of local updates follows the loss of the last two epochs."""

import pytest

from lowcal import LossTrend


@pytest.mark.parametrize(
    ("losses", "sign"),
    [
        ((), +1),
        ((2.0,), +1),
        ((2.0, 1.0), +1),
        ((1.0, 2.0), -1),
        ((1.0, 1.0), +1),  # L_{i-1} < L_i is strict
        ((3.0, 1.0, 2.0), -1),  # still under the loss of epoch 0
        ((1.0, 3.0, 2.0), +1),  # still over the loss of epoch 0
        ((1.0, 2.0, 3.0, 3.0), +1),
    ],
)
def test_sign(losses, sign):
    assert LossTrend()(losses) == sign
