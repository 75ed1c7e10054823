import csv
import io
from itertools import product
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from lowcal.errors import LowcalError
from lowcal.report.comparison import comparison_table, difference_interval, make_rows, wilson
from lowcal.report.headline import common_title, comparison_notes, headline
from lowcal.report.runs import RunData, read_runs

from .synthetic import MACHINE, write_run


def rows_of(folder):
    return {row.method: row for row in make_rows(read_runs([folder]))}


def test_means_deviations_and_ratios_worked_by_hand(tmp_path):
    write_run(tmp_path, "sgd", 0, error=10.0, seconds=12.0, flops=3000, memory=100)
    write_run(tmp_path, "sgd", 1, error=12.0, seconds=10.0, flops=3000, memory=110)
    write_run(tmp_path, "freeze", 0, error=11.0, seconds=8.0, flops=2400, memory=90, boundary=4)
    write_run(tmp_path, "freeze", 1, error=14.0, seconds=8.0, flops=1800, memory=95, boundary=5)
    rows = rows_of(tmp_path)
    assert list(rows) == ["sgd", "freeze"]
    assert rows["sgd"].as_dict() == {
        "method": "sgd",
        "seeds": 2,
        "epochs": 3,
        "top1_error": 11.0,
        "top1_error_std": pytest.approx(2**0.5),
        "seconds": 11.0,
        "seconds_std": pytest.approx(2**0.5),
        "speedup": 1.0,
        "speedup_std": 0.0,
        "flops_ratio": 1.0,
        "peak_memory_bytes": 110,
        "boundary": 0,
        "layers": 9,
        "last_memory_bytes": 110,
        "test_images": None,
        "top1_error_low": None,
        "top1_error_high": None,
    }
    freeze = rows["freeze"]
    # per seed: 12 / 8 = 1.5 and 10 / 8 = 1.25, not the ratio of the means
    assert freeze.speedup == pytest.approx(1.375)
    assert freeze.speedup_std == pytest.approx(0.125 * 2**0.5)
    assert freeze.flops_ratio == pytest.approx(0.7)
    assert freeze.seconds_std == 0.0
    assert freeze.top1_error_std == pytest.approx(4.5**0.5)
    assert (freeze.boundary, freeze.peak_memory_bytes) == (4.5, 95)


def test_one_seed_has_no_deviation_and_without_sgd_there_is_no_speedup(tmp_path):
    write_run(tmp_path, "local", 0)
    row = rows_of(tmp_path)["local"]
    assert (row.seeds, row.top1_error_std, row.seconds_std) == (1, None, None)
    assert (row.speedup, row.speedup_std, row.flops_ratio) == (None, None, None)


def test_only_seeds_that_sgd_ran_too_on_that_machine_count_for_the_speedup(tmp_path):
    write_run(tmp_path, "sgd", 0, seconds=12.0)
    write_run(tmp_path, "sgd", 2, seconds=12.0)
    write_run(tmp_path, "freeze", 0, seconds=8.0)
    write_run(tmp_path, "freeze", 1, seconds=1.0)
    write_run(tmp_path, "freeze", 2, seconds=2.0, machine=MACHINE | {"device_name": "another"})
    row = rows_of(tmp_path)["freeze"]
    assert (row.seeds, row.speedup, row.speedup_std) == (3, 1.5, None)


def test_an_unfinished_run_does_not_enter_a_finished_mean(tmp_path):
    write_run(tmp_path, "sgd", 0, error=10.0)
    write_run(tmp_path, "sgd", 1, done=1)
    write_run(tmp_path, "freeze", 0, done=2, seconds=12.0, flops=300)
    rows = rows_of(tmp_path)
    assert (rows["sgd"].seeds, rows["sgd"].top1_error, rows["sgd"].finished) == (1, 10.0, True)
    freeze = rows["freeze"]
    assert (freeze.finished, freeze.epochs, freeze.top1_error, freeze.seconds) == (False, 2, 50.0, 8.0)
    assert (freeze.speedup, freeze.flops_ratio) == (None, None)
    assert "| freeze (unfinished, 2 epochs) |" in comparison_table(list(rows.values())).markdown()


def test_an_error_that_was_not_finite_leaves_the_mean_unknown(tmp_path):
    write_run(tmp_path, "sgd", 0, error=float("nan"))
    write_run(tmp_path, "sgd", 1)
    row = rows_of(tmp_path)["sgd"]
    assert (row.top1_error, row.top1_error_std) == (None, None)
    assert "nan" not in comparison_table([row]).markdown()


def synthetic_run(seed, error, seconds):
    results = {
        "top1_error": error,
        "seconds": seconds,
        "flops": 10,
        "peak_memory_bytes": 1,
        "boundary": 0,
        "layers": 9,
        "epochs": 1,
    }
    return RunData(
        **dict.fromkeys(("path", "recipe", "model", "dataset", "label"), None),
        recipe_text="name: digits",
        method="sgd",
        seed=seed,
        planned=1,
        finished=True,
        records=({"peak_memory_bytes": 1},),
        results=results,
        environment={},
    )


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.001, 1e6)), min_size=1, max_size=6))
def test_a_row_is_the_sample_mean_and_deviation_whatever_the_order(results):
    runs = [synthetic_run(seed, *values) for seed, values in enumerate(results)]
    (row,) = make_rows(reversed(runs))
    errors, seconds = zip(*results, strict=True)
    assert row.top1_error == pytest.approx(mean(errors))
    assert row.seconds == pytest.approx(mean(seconds))
    if len(results) == 1:
        assert row.top1_error_std is row.seconds_std is None
    else:
        assert row.top1_error_std == pytest.approx(stdev(errors), abs=1e-9)
    assert row.speedup == 1.0
    assert len(comparison_table([row]).markdown().splitlines()) == 3
    (parsed,) = csv.DictReader(io.StringIO(comparison_table([row]).csv()))
    assert float(parsed["top1_error"]) == row.top1_error
    assert parsed["seconds_std"] == ("" if row.seconds_std is None else str(row.seconds_std))


def test_the_table_is_rounded_and_escaped(tmp_path):
    write_run(tmp_path, "sgd", 0, error=10.006, seconds=720.0, flops=3000, memory=3 * 2**30 // 2)
    write_run(tmp_path, "a|b", 0, error=9.0, seconds=600.0, flops=1500)
    rows = list(rows_of(tmp_path).values())
    _head, _rule, sgd, other = comparison_table(rows).markdown().splitlines()
    assert sgd == "| sgd | 10.01 | 12.00 min | 1.00× | 1.00× | 1.50 GiB | 1.50 GiB | – | 1 |"
    assert other == "| a\\|b | 9.00 | 10.00 min | 1.20× | 0.50× | 1.00 MiB | 1.00 MiB | – | 1 |"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {"model": "resnet8"},
            {"method": "local", "model": "vgg13"},
            r"has model 'resnet8'.*'vgg13'; report them apart",
        ),
        ({}, {"method": "local", "dataset": "cifar10"}, "dataset"),
        ({}, {"name": "again"}, "both sgd with seed 0"),
        ({}, {"seed": 1, "epochs": 4}, "differ in their recipes"),
        ({}, {"seed": 1, "recipe": "name: digits\noptimizer: {{lr: 1.0}}\n"}, "differ in their recipes"),
        ({}, {"seed": 1, "recipe": "a: [b"}, r"recipe\.yaml is not YAML"),
        ({}, {"seed": 1, "recipe": "text"}, r"recipe\.yaml is not a recipe"),
        ({}, {"seed": 1, "summary": {"epochs": 2}}, r"epochs\.jsonl has 3 epochs, summary\.json has 2"),
    ],
)
def test_runs_that_cannot_be_averaged_are_refused(tmp_path, first, second, message):
    write_run(tmp_path, **{"method": "sgd"} | first)
    write_run(tmp_path, **{"method": "sgd"} | second)
    with pytest.raises(LowcalError, match=message) as caught:
        read_runs([tmp_path])
    assert "\n" not in str(caught.value)


def test_the_same_run_given_twice_counts_once(tmp_path):
    write_run(tmp_path, "sgd")
    assert len(read_runs([tmp_path, tmp_path / "sgd-seed0"])) == 1


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(LowcalError, match="absent is not a folder"):
        read_runs([tmp_path / "absent"])
    with pytest.raises(LowcalError, match="is not a run folder and holds none"):
        read_runs([tmp_path])
    with pytest.raises(LowcalError, match="no run was given"):
        read_runs([])
    write_run(tmp_path, "sgd", done=0)
    for path in (tmp_path, tmp_path / "sgd-seed0"):
        with pytest.raises(LowcalError, match=r"epochs\.jsonl holds no epoch yet"):
            read_runs([path])
    write_run(tmp_path, "local", done=1)
    assert [run.method for run in read_runs([tmp_path])] == ["local"]


IMAGES = {"train": 300, "train_of": 50_000, "test": 400, "test_of": 10_000, "classes": 10, "folder": None}


def test_runs_of_other_images_or_networks_are_told_and_not_compared(tmp_path):
    recipe = "name: digits\nmodel: {{name: resnet8, width: 4}}\ndata: {{name: digits, train_images: %s, workers: %s}}\n"
    write_run(tmp_path, "sgd", seconds=12.0, recipe=recipe % (300, 1))
    write_run(tmp_path, "freeze", seconds=10.0, boundary=4, recipe=recipe % (300, 2))  # workers change no image
    write_run(tmp_path, "local", seconds=10.0, boundary=4, recipe=recipe % (200, 1))
    rows = rows_of(tmp_path)
    assert rows["freeze"].speedup == pytest.approx(1.2)
    assert (rows["local"].speedup, rows["local"].flops_ratio) == (None, None)
    runs = read_runs([tmp_path])
    assert (
        "Not the same network and images, so errors and times are not compared: sgd data.train_images=300; "
        "local data.train_images=200; freeze data.train_images=300."
    ) in comparison_notes(runs, list(rows.values()))
    assert "freeze trained 1.20× faster than SGD" in headline(list(rows.values()))
    assert "local reached 10.00 % top-1 error in 10.0 s of training" in headline(list(rows.values()))
    assert common_title([run.titled for run in runs]) == "ResNet8 of width 4 on 8x8 digits, 3 epochs"


def test_folders_that_held_other_images_are_told_apart(tmp_path):
    write_run(tmp_path, "sgd", images=IMAGES)
    write_run(tmp_path, "local", images=IMAGES | {"train": 200}, boundary=4)
    assert rows_of(tmp_path)["local"].speedup is None


def test_errors_of_few_images_have_their_interval(tmp_path):
    write_run(tmp_path, "sgd", error=10.0, images=IMAGES)
    write_run(tmp_path, "local", error=12.0, seconds=6.0, boundary=4, images=IMAGES)
    write_run(tmp_path, "freeze", error=30.0, seconds=6.0, boundary=4, images=IMAGES)
    rows = rows_of(tmp_path)
    assert (rows["sgd"].top1_error_low, rows["sgd"].top1_error_high) == pytest.approx(wilson(10.0, 400))
    assert (
        "Errors are of 400 test images, 95 % intervals: sgd 7.4 to 13.3, local 9.2 to 15.6, freeze 25.7 to 34.7."
        in comparison_notes(read_runs([tmp_path]), list(rows.values()))
    )
    text = headline(list(rows.values()))
    assert "at +2.0 points of top-1 error (too little for 400 test images to tell)" in text
    assert "freeze 2.00× faster at +20.0 points. " in text


def test_runs_of_another_version_with_another_label_are_averaged(tmp_path):
    for seed, label in enumerate(("old words", "new words")):
        write_run(tmp_path, "sgd", seed, recipe=f"name: digits\nlabel: {label}\n")
    assert rows_of(tmp_path)["sgd"].seeds == 2


def test_damaged_counts_of_images_are_refused(tmp_path):
    write_run(tmp_path, "sgd", images=IMAGES | {"train": "many"})
    with pytest.raises(LowcalError, match=r"environment\.json has damaged 'images'"):
        read_runs([tmp_path])


@pytest.mark.parametrize(("wrong", "images"), [(0, 100), (3, 100), (50, 449), (449, 449), (600, 10_000)])
def test_wilson_is_scipys(wrong, images):
    expected = binomtest(wrong, images).proportion_ci(method="wilson")
    assert wilson(100 * wrong / images, images) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-4)


@pytest.mark.parametrize(("error", "baseline"), [(0.1, 0.1), (0.3, 0.2), (0.05, 0.02)])
def test_the_interval_of_a_difference_covers_it_in_about_95_of_100_cases(error, baseline):
    images, covered = 60, 0.0
    for wrong, base in product(range(images + 1), repeat=2):
        low, high = difference_interval(100 * wrong / images, 100 * base / images, images)
        if low <= 100 * (error - baseline) <= high:
            covered += binom.pmf(wrong, images, error) * binom.pmf(base, images, baseline)
    assert 0.94 <= covered <= 0.99
