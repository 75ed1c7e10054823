"""Algorithm 2: the direction of local updates follows the loss of the last two epochs."""

import pytest

from lowcal import LossTrend, LowcalError


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


@pytest.mark.parametrize(
    ("losses", "sign"),
    [
        ((), +1),
        ((2.0,), +1),
        ((2.0, 1.0), +1),
        ((1.0, 2.0), -1),  # it rose: reversed
        ((1.0, 2.0, 1.5), -1),  # it fell: maintained, where Algorithm 2's listing has +1 again
        ((1.0, 2.0, 1.5, 1.5), -1),  # level: maintained
        ((1.0, 2.0, 3.0), +1),  # it rose twice: reversed twice, where the listing has -1
        ((1.0, 2.0, 1.5, 1.6, 1.4), +1),
    ],
)
def test_a_sign_that_is_kept(losses, sign):
    assert LossTrend(sign="kept")(losses) == sign


@pytest.mark.parametrize("value", ["state", None, True])
def test_another_sign_is_refused(value):
    with pytest.raises(LowcalError, match=f"sign is {value!r}; give 'recomputed' or 'kept'"):
        LossTrend(sign=value)
