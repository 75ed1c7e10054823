"""Where the boundary goes: Algorithm 1 and Eq. 3 against traces worked by hand."""

import itertools
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowcal import Fixed, LowcalError, NormTrend, Quadratic
from lowcal.schedule import Progress, interval


def trace(schedule, norms, *, layers, epochs=None, block=2, boundary=0, ends=()):
    """The boundary after each epoch, given the norm of the transition layer's change in each."""
    epochs = epochs or len(norms) + 1
    changes, earlier, boundaries = (), (), []
    for epoch, norm in enumerate(norms):
        changes += (norm,)
        following = schedule(
            Progress(
                epoch=epoch + 1,
                epochs=epochs,
                layers=layers,
                block=block,
                boundary=boundary,
                changes=changes,
                ends=ends,
                earlier=earlier if schedule.remembers else None,
            )
        )
        if following != boundary:
            earlier += tuple((boundary, change) for change in changes)
            changes = ()  # a new transition layer
        boundary = following
        boundaries.append(boundary)
    return boundaries


# Algorithm 1 with K = 2, t_shift = 3, alpha = 0.5: (norm of the epoch, e_k, mean of the 2 before, boundary after)
BY_HAND = [
    (8.0, 0, None, 0),
    (4.0, 1, None, 0),  # 4 <= 0.5 * 8, but K epochs have not gone by
    (3.0, 2, 6.0, 3),  # 3 <= 0.5 * 6, equality counts: T = 3, e_k = 0
    (1.0, 0, None, 3),  # another layer's first norm: 8, 4 and 3 count no more
    (9.0, 1, None, 3),
    (2.6, 2, 5.0, 3),  # 2.6 > 2.5; the last 2 with the norm itself (5.8) would move
    (3.0, 3, 5.8, 3),  # 3 > 2.9
    (1.5, 4, 2.8, 3),  # 1.5 > 1.4; the mean of all before (3.9) would move
    (1.125, 5, 2.25, 6),  # 1.125 <= 1.125: T = 6
    (0.5, 0, None, 6),
    (0.1, 1, None, 6),
    (0.2, 2, 0.3, 6),  # 0.2 > 0.15
    (0.0, 3, 0.15, 9),
]


def test_algorithm_1_by_hand():
    norms = [row[0] for row in BY_HAND]
    schedule = NormTrend(alpha=0.5, shift=3, interval=2, max_fraction=0.75)
    assert trace(schedule, norms, layers=20) == [row[3] for row in BY_HAND]


def test_algorithm_1_at_the_published_alpha():
    schedule = NormTrend(shift=2, interval=1)
    assert trace(schedule, [100.0, 96.0, 91.0, 50.0, 47.0], layers=20) == [0, 0, 2, 2, 4]  # 91 <= 91.2, 47 <= 47.5


@pytest.mark.parametrize("waiting", [1, 2, 3, 5])
def test_moves_are_k_epochs_of_one_layer_apart(waiting):
    boundaries = trace(NormTrend(shift=1, interval=waiting), [1.0 / 2**e for e in range(24)], layers=40)
    moves = [epoch for epoch in range(1, 24) if boundaries[epoch] != boundaries[epoch - 1]]
    assert moves[0] == waiting  # e_k counts from 0, and K norms come before the one that moves
    assert {b - a for a, b in itertools.pairwise(moves)} == {waiting + 1}


# Moves at least K epochs apart (Sec. 2.2), K = 2, t_shift = 3, alpha = 0.5: (norm, e_k + 1, mean, boundary)
BY_PROSE = [
    (8.0, 1, None, 0),
    (4.0, 2, 8.0, 3),  # 4 <= 0.5 * 8: K epochs have gone by, and one norm is before this one
    (1.0, 1, None, 3),
    (0.6, 2, 1.0, 3),  # 0.6 > 0.5; with the 4 of the earlier layer (mean 2.5) it would move
    (0.4, 3, 0.8, 6),  # 0.4 <= 0.4, equality counts
    (0.2, 1, None, 6),
    (0.1, 2, 0.2, 9),
]


def test_the_prose_by_hand():
    schedule = NormTrend(alpha=0.5, shift=3, interval=2, spacing="prose")
    assert trace(schedule, [row[0] for row in BY_PROSE], layers=20) == [row[3] for row in BY_PROSE]


# The same over the norms of earlier layers too: always the last 2 norms before this one.
ACROSS_MOVES = [
    (8.0, 1, None, 0),
    (4.0, 2, 8.0, 3),
    (1.0, 1, 6.0, 3),  # 1 <= 3, but K epochs have not gone by
    (0.6, 2, 2.5, 6),  # (4 + 1) / 2
    (0.4, 1, 0.8, 6),
    (0.26, 2, 0.5, 6),  # 0.26 > 0.25; over this layer's alone (0.4) too
    (0.2, 3, 0.33, 6),  # 0.2 > 0.165
    (0.115, 4, 0.23, 9),
]


def test_the_mean_across_moves_by_hand():
    schedule = NormTrend(alpha=0.5, shift=3, interval=2, spacing="prose", average="run")
    assert trace(schedule, [row[0] for row in ACROSS_MOVES], layers=20) == [row[3] for row in ACROSS_MOVES]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=40), st.floats(0, 1.5), st.integers(1, 6))
def test_by_the_listing_the_last_k_norms_are_the_present_layers(norms, alpha, waiting):
    """So the mean across moves is the mean of the present layer there: the two readings are one."""
    layer, run = (NormTrend(alpha, 1, interval=waiting, average=average) for average in ("layer", "run"))
    assert trace(layer, norms, layers=60) == trace(run, norms, layers=60)


@pytest.mark.parametrize(
    ("waiting", "average", "apart"),
    [(1, "layer", 2), (1, "run", 1), (2, "layer", 2), (2, "run", 2), (5, "layer", 5), (5, "run", 5)],
)
def test_by_the_prose_moves_are_k_epochs_apart(waiting, average, apart):
    schedule = NormTrend(shift=1, interval=waiting, spacing="prose", average=average)
    boundaries = trace(schedule, [1.0 / 2**e for e in range(24)], layers=40)
    moves = [epoch for epoch in range(1, 24) if boundaries[epoch] != boundaries[epoch - 1]]
    assert moves[0] == max(waiting - 1, 1)  # one norm at least is before the one that moves
    assert {b - a for a, b in itertools.pairwise(moves)} == {apart}


# A stem, blocks of 2, 4, 2 and 3 layers, a layer between the last two blocks, and a classifier: 14 layers.
ENDS = (1, 3, 7, 9, 10, 13, 14)


@pytest.mark.parametrize(
    ("shift", "fraction", "expected"),
    [
        (1, 1.0, [1, 3, 7, 9, 10, 13, 13, 13]),
        (2, 1.0, [3, 7, 9, 13, 13, 13, 13, 13]),
        (3, 1.0, [3, 7, 10, 13, 13, 13, 13, 13]),
        (5, 1.0, [7, 13, 13, 13, 13, 13, 13, 13]),
        (3, 0.75, [3, 7, 10, 10, 10, 10, 10, 10]),  # floor(0.75 * 14) = 10
        (3, 0.6, [3, 7, 7, 7, 7, 7, 7, 7]),  # 8: no end but 7 below it
        (3, 0.1, [1, 1, 1, 1, 1, 1, 1, 1]),
        (5, 0.05, [0] * 8),
    ],
)
def test_moves_by_whole_blocks(shift, fraction, expected):
    schedule = NormTrend(shift=shift, interval=1, max_fraction=fraction, align="block")
    boundaries = trace(schedule, [0.5**e for e in range(17)], layers=14, ends=ENDS)
    assert boundaries[1::2] == expected
    assert trace(schedule, [0.5**e for e in range(17)], layers=14, ends=ENDS, boundary=12)[-1] in (12, 13)


def test_resnet50_over_90_epochs():
    """The fifth move, from which on memory is below half (Figure 4: in epoch 33), and the end, for each reading."""

    def moves(**options):
        path = trace(NormTrend(**options), [0.5**e for e in range(89)], layers=54, epochs=90, block=3, ends=RESNET50)
        return [(epoch, boundary) for epoch, (before, boundary) in enumerate(itertools.pairwise(path), 2) if
                before != boundary]  # fmt: skip

    listing, prose = moves(), moves(spacing="prose")
    assert (listing[0], listing[4], listing[-1]) == ((8, 3), (40, 15), (88, 33))
    assert (prose[0], prose[4], prose[-1]) == ((7, 3), (35, 15), (84, 36))
    blocks = moves(align="block")
    assert (blocks[0], blocks[3], blocks[-1]) == ((8, 5), (32, 15), (88, 37))
    assert moves(spacing="prose", align="block")[-1] == (84, 40)


@pytest.mark.parametrize(
    ("layers", "block", "epochs", "listing", "prose"),
    [
        (21, 2, 90, 14, 15),  # ResNet18 on CIFAR-10; the cap is 15
        (13, 1, 90, 8, 9),  # VGG13 on CIFAR-10; 9
        (13, 1, 150, 9, 9),  # VGG13 on CIFAR-100; 9
        (37, 2, 90, 24, 27),  # ResNet34; 27
        (54, 3, 90, 33, 36),  # ResNet50; 40
        (53, 3, 150, 36, 39),  # MobileNetV2; 39
    ],
)
def test_the_last_boundary_of_the_papers_networks_at_most(layers, block, epochs, listing, prose):
    """As docs/method.md has them."""
    norms = [0.5**e for e in range(epochs - 1)]
    for spacing, last in (("listing", listing), ("prose", prose)):
        assert trace(NormTrend(spacing=spacing), norms, layers=layers, epochs=epochs, block=block)[-1] == last


RESNET50 = (1, 5, 8, 11, 15, 18, 21, 24, 28, 31, 34, 37, 40, 43, 47, 50, 53, 54)


def test_a_growing_or_level_change_never_moves_the_boundary():
    assert set(trace(NormTrend(shift=1, interval=1), [1.0] * 10, layers=20)) == {0}
    assert set(trace(NormTrend(shift=1, interval=1), [1.1**e for e in range(10)], layers=20)) == {0}


def test_the_boundary_never_exceeds_the_fraction():
    boundaries = trace(NormTrend(shift=2, interval=1, max_fraction=0.75), [0.5**e for e in range(12)], layers=7)
    assert boundaries == [0, 2, 2, 4, 4, 5, 5, 5, 5, 5, 5, 5]  # floor(0.75 * 7) = 5
    assert set(trace(NormTrend(shift=2, interval=1, max_fraction=0.1), [0.5**e for e in range(9)], layers=7)) == {0}


def test_the_fraction_is_meant_in_decimals():
    # 0.58 * 50 is 28.999999999999996 in binary
    assert max(trace(NormTrend(shift=10, interval=1, max_fraction=0.58), [0.5**e for e in range(20)], layers=50)) == 29


def test_a_boundary_beyond_the_fraction_stays():
    assert (
        trace(NormTrend(shift=2, interval=1, max_fraction=0.5), [0.5**e for e in range(6)], layers=10, boundary=8)
        == [8] * 6
    )


def test_one_layer_is_always_left_to_sgd():
    assert max(trace(NormTrend(shift=3, interval=1, max_fraction=1.0), [0.5**e for e in range(12)], layers=7)) == 6
    assert max(trace(Quadratic(100.0, 0.0, max_fraction=1.0), [1.0] * 3, layers=7)) == 6


# Eq. 2: E_max / (0.75 L / t_shift), rounded. L counts every convolution and linear layer, shortcuts too.
@pytest.mark.parametrize(
    ("network", "layers", "shift", "epochs", "expected"),
    [
        ("resnet18, cifar10", 21, 2, 90, 11),  # 11.43
        ("resnet18, cifar100", 21, 2, 150, 19),  # 19.05
        ("vgg13, cifar10", 13, 1, 90, 9),  # 9.23
        ("vgg13, cifar100", 13, 1, 150, 15),  # 15.38
        ("resnet34, imagenet", 37, 2, 90, 6),  # 6.49
        ("resnet50, imagenet", 54, 3, 90, 7),  # 6.67
        ("mobilenet_v2, imagenet", 53, 3, 150, 11),  # 11.32
        ("a short run", 54, 3, 5, 1),  # 0.37, at least 1
    ],
)
def test_equation_2(network, layers, shift, epochs, expected):
    assert interval(layers, shift, epochs, 0.75) == expected


def test_k_and_shift_default_to_the_network_and_the_epochs():
    norms = [0.5**e for e in range(89)]
    found = trace(NormTrend(), norms, layers=21, epochs=90, block=2)
    assert found == trace(NormTrend(shift=2, interval=11), norms, layers=21, epochs=90, block=7)
    assert [found.index(t) for t in (2, 4, 6, 8, 10, 12, 14)] == [11, 23, 35, 47, 59, 71, 83]
    halved = trace(NormTrend(max_fraction=0.375), norms, layers=21, epochs=90, block=2)
    assert halved.index(2) == 23  # K = 90 / (0.375 * 21 / 2) = 22.86


# Eq. 3 with c1 = 10, c2 = 0.1, E_max = 10: 10 - 0.1 (E - 10)^2 = 1.9, 3.6, 5.1, 6.4, 7.5, 8.4, 9.1, 9.6, 9.9
def test_equation_3_by_hand():
    assert trace(Quadratic(10, 0.1), [1.0] * 9, layers=20, epochs=10) == [1, 3, 5, 6, 7, 8, 9, 9, 9]


def test_equation_3_is_zero_before_its_root_and_capped():
    assert trace(Quadratic(2, 0.25), [1.0] * 9, layers=20, epochs=10) == [0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert trace(Quadratic(10, 0.1), [1.0] * 9, layers=8, epochs=10) == [1, 3, 5, 6, 6, 6, 6, 6, 6]
    assert trace(Quadratic(10, 0.1, max_fraction=0.5), [1.0] * 9, layers=8, epochs=10)[-1] == 4


def test_equation_3_never_goes_back():
    assert trace(Quadratic(10, 0.1), [1.0] * 9, layers=20, epochs=10, boundary=7) == [7, 7, 7, 7, 7, 8, 9, 9, 9]


@given(
    st.floats(0, 60), st.floats(0, 5), st.floats(0.01, 1), st.integers(2, 60), st.integers(1, 40), st.integers(0, 10)
)
def test_equation_3_is_monotone_and_capped(c1, c2, fraction, layers, epochs, start):
    start = min(start, layers - 1)
    found = [start, *trace(Quadratic(c1, c2, fraction), [1.0] * epochs, layers=layers, epochs=epochs, boundary=start)]
    assert found == sorted(found)
    assert found[-1] <= max(start, math.floor(fraction * layers + 1e-9))
    assert all(isinstance(boundary, int) for boundary in found)


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=40), st.floats(0, 1.5), st.floats(0.01, 1), st.integers(2, 60),
    st.integers(1, 9), st.integers(1, 6),
)  # fmt: skip
def test_algorithm_1_is_monotone_and_capped(norms, alpha, fraction, layers, shift, waiting):
    schedule = NormTrend(alpha=alpha, shift=shift, max_fraction=fraction, interval=waiting)
    found = [0, *trace(schedule, norms, layers=layers)]
    assert found == sorted(found)
    assert found[-1] <= math.floor(fraction * layers + 1e-9)
    assert all(b - a <= shift for a, b in itertools.pairwise(found))


def test_fixed_holds_from_its_epoch_on():
    # what the boundary is in epochs 1 to 7
    assert trace(Fixed({2: 3, 5: 6}), [1.0] * 7, layers=20) == [0, 3, 3, 3, 6, 6, 6]
    assert trace(Fixed({5: 6, 2: 3}), [1.0] * 7, layers=20) == [0, 3, 3, 3, 6, 6, 6]
    assert trace(Fixed({2: 3}), [1.0] * 4, layers=20, boundary=5) == [5, 5, 5, 5]
    assert Fixed({0: 2, 4: 3}).start(20) == 2
    assert Fixed({2: 3}).start(20) == NormTrend().start(20) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("alpha", -0.1), ("alpha", math.nan), ("alpha", math.inf), ("alpha", "x"),
     ("shift", 0), ("shift", -2), ("shift", 1.5),
     ("max_fraction", 1.1), ("max_fraction", -0.1), ("max_fraction", 0.0), ("max_fraction", math.nan),
     ("interval", 0), ("interval", -1), ("interval", 2.5),
     ("spacing", "letter"), ("measure", None), ("average", "all"), ("align", ["block"])],
)  # fmt: skip
def test_norm_trend_refuses(name, value):
    with pytest.raises(LowcalError, match=rf"{name}\b.*{re.escape(str(value))}") as error:
        NormTrend(**{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("c1", math.nan), ("c1", math.inf), ("c2", math.nan), ("c2", -0.1), ("max_fraction", 1.5), ("max_fraction", -1.0)],
)
def test_quadratic_refuses(name, value):
    with pytest.raises(LowcalError, match=rf"{name}\b.*{value}") as error:
        Quadratic(**{"c1": 10, "c2": 0.1, name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("epochs", "named"),
    [({-1: 2}, "-1"), ({1: -2}, "-2"), ({1: 3, 2: 2}, "2"), ({1.5: 2}, "1.5"), ({1: 2.5}, "2.5")],
    ids=str,
)
def test_fixed_refuses(epochs, named):
    with pytest.raises(LowcalError, match=named) as error:
        Fixed(epochs)
    assert "\n" not in str(error.value)


def test_a_schedule_that_does_not_fit_the_network_is_refused():
    Fixed({1: 4}).check(layers=5, epochs=10)
    with pytest.raises(LowcalError, match=r"\b5\b"):
        Fixed({1: 5}).check(layers=5, epochs=10)  # nothing would be left to SGD
    NormTrend().check(layers=5, epochs=10)
    Quadratic(3, 0.1).check(layers=5, epochs=10)
