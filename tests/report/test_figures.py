import re
from xml.etree import ElementTree

import numpy as np
import pytest

from lowcal.errors import LowcalError
from lowcal.report import figures
from lowcal.report.inline import inline_svg, plot_data
from lowcal.report.runs import read_runs

from .synthetic import write_run


def lines_of(figure):
    """The mean lines by method, then the thin lines of seeds."""
    (axes,) = figure.axes
    lines = axes.get_lines()
    means = {line.get_label(): line.get_xydata() for line in lines if not line.get_label().startswith("_")}
    return means, [line.get_xydata() for line in lines if line.get_label() == "_seed"]


def marked(figure, label):
    """What is drawn under a label that starts with an underscore, where there is something."""
    lines = [line.get_xydata() for line in figure.axes[0].get_lines() if line.get_label() == label]
    return [line for line in lines if len(line)]


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path, "sgd", 0, error=10.0, seconds=12.0)
    write_run(tmp_path, "sgd", 1, error=12.0, seconds=15.0)
    write_run(tmp_path, "local", 0, error=20.0, seconds=9.0, boundary=4, memory=2**21)
    return read_runs([tmp_path])


def test_error_against_time_draws_the_mean_of_error_and_of_time_and_each_seed(runs):
    means, seeds = lines_of(figures.error_against_time(runs))
    np.testing.assert_allclose(means["sgd"], [(4.5, 50), (9, 50), (13.5, 11)])
    np.testing.assert_allclose(means["local"], [(3, 50), (6, 50), (9, 20)])
    np.testing.assert_allclose(seeds, [[(4, 50), (8, 50), (12, 10)], [(5, 50), (10, 50), (15, 12)]])


def test_figures_over_epochs_count_from_one_in_the_units_of_their_title(runs):
    means, _ = lines_of(figures.boundary(runs))
    np.testing.assert_allclose(means["local"], [(1, 0), (2, 0), (3, 4)])
    means, _ = lines_of(figures.peak_memory(runs))
    np.testing.assert_allclose(means["local"], [(1, 2), (2, 2), (3, 2)])
    means, _ = lines_of(figures.step_time(runs))
    np.testing.assert_allclose(means["local"][:, 1], 300)
    means, _ = lines_of(figures.loss(runs, images="train"))
    np.testing.assert_allclose(means["local"][:, 1], [2, 1, 2 / 3])
    means, _ = lines_of(figures.loss(runs, images="test"))
    np.testing.assert_allclose(means["local"][:, 1], [2.5, 1.25, 2.5 / 3])


def test_methods_without_a_boundary_have_no_line_of_it(runs):
    assert set(lines_of(figures.boundary(runs))[0]) == {"local"}
    assert set(lines_of(figures.step_time(runs))[0]) == {"sgd", "local"}


@pytest.mark.parametrize("draw", [figures.error_against_time, figures.step_time])
def test_moves_are_marked_where_a_step_has_a_new_boundary_for_the_first_time(runs, draw):
    (move,) = marked(draw(runs), "_move")
    np.testing.assert_allclose(move, [lines_of(draw(runs))[0]["local"][2]])
    assert not marked(figures.peak_memory(runs), "_move")


def test_bars_at_the_end_go_from_the_lowest_to_the_highest_seed(runs):
    across, down = marked(figures.error_against_time(runs), "_bar")
    np.testing.assert_allclose(across, [(12, 11), (15, 11)])
    np.testing.assert_allclose(down, [(13.5, 10), (13.5, 12)])


def test_equal_lines_differ_in_width_and_dashes(runs):
    lines = [line for line in figures.loss(runs, images="test").axes[0].get_lines() if line.get_label()[0] != "_"]
    assert len({(line.get_linewidth(), str(line.get_linestyle())) for line in lines}) == 2
    assert lines[0].get_linewidth() > lines[1].get_linewidth()
    assert lines[0].get_linestyle() != lines[1].get_linestyle()


def test_the_data_of_the_script_are_the_points_in_the_picture(runs):
    figure = figures.error_against_time(runs)
    svg = ElementTree.fromstring(inline_svg(figure, "name", [figures.INK, "#0072b2"], "label"))
    plot = plot_data(figure)
    assert plot["units"] == ["s", "%"]
    assert plot["series"]["1"] == [[3, 50], [6, 50], [9, 20]]
    left, top, right, bottom = plot["box"]
    (path,) = [group.find("path").get("d") for group in svg.iter("g") if group.get("id") == "name-series-1-mean"]
    (low, high), (bottom_y, top_y) = plot["x"], np.log(plot["y"]) if plot["log"] else plot["y"]
    for drawn, (x, y) in zip(re.findall(r"[ML] (\S+) (\S+)", path), plot["series"]["1"], strict=True):
        height = ((np.log(y) if plot["log"] else y) - bottom_y) / (top_y - bottom_y)
        expected = left + (right - left) * (x - low) / (high - low), bottom - (bottom - top) * height
        np.testing.assert_allclose([float(number) for number in drawn], expected, atol=0.3)


def test_an_unfinished_seed_has_its_line_and_does_not_shorten_the_mean(tmp_path):
    write_run(tmp_path, "sgd", 0)
    write_run(tmp_path, "sgd", 1, done=1)
    means, seeds = lines_of(figures.step_time(read_runs([tmp_path])))
    assert len(means["sgd"]) == 3
    assert sorted(map(len, seeds)) == [1, 3]


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_line_lies_inside_its_axes_and_the_legend_outside(runs, name):
    figure = figures.FIGURES[name](runs)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    box, legend = axes.get_window_extent(), axes.get_legend().get_window_extent()
    assert legend.y0 >= box.y1 - 1
    assert legend.y1 <= figure.bbox.y1
    for line in axes.get_lines():
        points = axes.transData.transform(line.get_xydata())
        assert (points >= [box.x0 - 1, box.y0 - 1]).all()
        assert (points <= [box.x1 + 1, box.y1 + 1]).all()


def test_colours_are_each_methods_own_whatever_else_is_shown():
    everything = figures.colours(["sgd", "local", "freeze", "refresh", "stochastic-depth", "prune", "mine", "yours"])
    assert len(set(everything.values())) == 8
    assert figures.colours(["prune", "local"]) == {name: everything[name] for name in ("prune", "local")}


def test_figures_are_written_as_svg_or_png(runs, tmp_path):
    figure = figures.error_against_time(runs)
    figures.save(figure, tmp_path / "a.svg")
    figures.save(figure, tmp_path / "a.PNG")
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")
    first = (tmp_path / "a.svg").read_bytes()
    figures.save(figures.error_against_time(runs), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_bytes() == first
    with pytest.raises(LowcalError, match=r"'a\.jpeg'.*\.svg or \.png"):
        figures.save(figure, tmp_path / "a.jpeg")


def test_sgd_compressed_is_the_line_of_its_ends(tmp_path):
    write_run(tmp_path, "sgd", 0, error=8.0, seconds=20.0)
    write_run(tmp_path, "freeze", 0, error=9.0, seconds=10.0, boundary=4)
    for epochs, error, seconds in ((1, 30.0, 6.0), (2, 10.0, 11.0)):
        name = f"sgd-compressed-{epochs}-seed0"
        write_run(
            tmp_path, "sgd", error=error, seconds=seconds, epochs=epochs, name=name, variant=f"compressed-{epochs}"
        )
    runs = read_runs([tmp_path])
    means, _ = lines_of(figures.error_against_time(runs))
    np.testing.assert_allclose(means["sgd, compressed"], [(6, 30), (11, 10), (20, 8)])
    assert set(lines_of(figures.step_time(runs))[0]) == {"sgd", "freeze"}
