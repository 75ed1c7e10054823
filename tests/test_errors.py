import pytest

from lowcal.errors import LowcalError, nearest


def test_error_is_a_value_error():
    assert issubclass(LowcalError, ValueError)


@pytest.mark.parametrize(
    ("name", "choices", "expected"),
    [
        ("resnet19", ["vgg13", "resnet18"], "; did you mean 'resnet18'?"),
        ("DIGITS", ["digits", "cifar10"], "; did you mean 'digits'?"),
        ("cifar-10", ["digits", "cifar10"], "; did you mean 'cifar10'?"),
        ("xyz", ["sgd", "local", "freeze"], "; choose from freeze, local, sgd"),
        ("xyz", [], ""),
    ],
)
def test_nearest(name, choices, expected):
    assert nearest(name, choices) == expected


def test_nearest_keeps_the_spelling_of_the_choice():
    assert nearest("norm_stats", ["Norm-Stats"]) == "; did you mean 'Norm-Stats'?"
