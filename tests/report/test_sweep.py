import json

import pytest

from lowcal.report.sweep import short_names, sweep_figure, sweep_table, sweep_text, write_sweep


def row(trial, error, seconds=10.0, reason=None, **settings):
    keyed = {"trial": trial, "settings": settings or {"local.lr": 0.01 * (trial + 1)}, "reason": reason}
    results = {"top1_error": error, "best_top1_error": error, "seconds": seconds, "flops": 1e9}
    rest = {"top1_error_std": None, "seconds_std": None, "boundary": 3.0, "layers": 10.0, "device": "CPU", "runs": []}
    return {**keyed, **(dict.fromkeys(results) if reason else results), **rest}


def summary(rows, **changes):
    plain = {
        "label": "A label", "title": "A title",
        "method": "local", "model": "resnet8", "dataset": "digits", "evaluate": "validation",
        "objectives": ["top1_error"], "sampler": "tpe", "seeds": 1, "search": ["local.lr=0.001:0.1:log"],
        "logarithmic": ["local.lr"],
    }  # fmt: skip
    made = {**plain, **changes}
    return {"best": [], **made, "rows": rows}


def test_short_names_tell_settings_apart():
    keys = ["local.lr", "optimizer.lr", "local.schedule.alpha", "batch"]
    assert list(short_names(keys).values()) == ["local.lr", "optimizer.lr", "alpha", "batch"]
    assert short_names(["stochastic_depth.survival"]) == {"stochastic_depth.survival": "survival"}
    assert list(short_names(["data.classes", "prune.every", "local.every"]).values())[1:] == [
        "prune.every",
        "local.every",
    ]


def test_the_table_is_sorted_by_the_objective_and_a_grids_is_not():
    rows = [row(0, 9.0), row(1, None, reason="trial-0001-seed0: the loss became nan at step 1"), row(2, 5.0)]
    lines = sweep_table(summary(rows, best=[2])).cells()
    assert [line[0] for line in lines] == ["2", "0", "1"]
    assert lines[0][-1] == "*"
    assert "nan" in lines[2][-1]
    lines = sweep_table(summary(rows, sampler="grid")).cells()
    assert [line[0] for line in lines] == ["0", "1", "2"]


def test_long_sweeps_are_printed_in_part_and_written_whole(tmp_path):
    rows = [row(trial, float(trial)) for trial in range(30)]
    heading = {name: value for name, value in summary(rows, best=[0]).items() if name != "rows"}
    report = write_sweep(rows, heading, tmp_path)
    text = sweep_text(report.summary)
    assert text.endswith("... and 10 more")
    assert max(map(len, text.splitlines())) <= 80
    assert (tmp_path / "sweep.md").read_text().count("\n| ") >= 31
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 31
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert (written["format"], len(written["rows"]), written["best"]) == (1, 30, [0])
    assert {file.name for file in report.files} == {entry.name for entry in tmp_path.iterdir()}


@pytest.mark.parametrize("objectives", [["top1_error"], ["top1_error", "seconds"]])
def test_the_figure_has_a_panel_for_each_objective_and_setting(objectives):
    rows = [
        row(trial, 10.0 - trial, **{"local.lr": 10.0**-trial, "local.schedule.shift": shift, "local.supervision": True})
        for trial, shift in enumerate([1, None, 2])
    ]
    figure = sweep_figure(summary(rows, objectives=objectives))
    assert len(figure.axes) == 3 * len(objectives)
    rate, shift, supervision = figure.axes[:3]
    assert rate.get_xscale() == "log"
    assert sorted(rate.lines[0].get_xdata()) == pytest.approx([0.01, 0.1, 1.0])
    assert [label.get_text() for label in shift.get_xticklabels()] == ["1", "2", "null"]
    assert [label.get_text() for label in supervision.get_xticklabels()] == ["true"]
