import io
import re

import pytest
from rich.console import Console

from lowcal.console import Display, clock, comparison_text, layers_text
from lowcal.experiments.arms import Arm
from lowcal.training.epoch import Progress


def row(**changes):
    plain = {
        "method": "stochastic-depth",
        "top1_error": 99.99,
        "top1_error_std": 12.345,
        "seconds": 359_999.0,
        "speedup": 12.345,
        "flops_ratio": 0.5,
        "seeds": 3,
        "peak_memory_bytes": 143 * 1024**3,
        "last_memory_bytes": 60.1 * 1024**3,
        "boundary": 112.5,
        "layers": 155,
    }
    return plain | changes


def test_the_widest_comparison_fits_in_80_columns():
    table = comparison_text([row(), row(method="sgd", top1_error_std=None, speedup=None, flops_ratio=None)])
    assert max(map(len, table.splitlines())) <= 80
    assert "99.99 ± 12.35" in table
    assert "143→60.1GiB" in table
    assert "112/155" in table


def test_a_whole_boundary_has_no_point_and_what_is_unknown_is_a_dash():
    line = comparison_text([row(boundary=6.0, speedup=None, top1_error=None, top1_error_std=None)]).splitlines()[2]
    assert line.endswith("  6/155")
    assert line.split()[1] == "–"


def test_two_seeds_are_shown_as_they_are_and_no_boundary_as_none():
    pair = row(method="sgd", seeds=2, top1_error=11.0, top1_error_std=2**0.5, boundary=0, last_memory_bytes=2**20)
    line = comparison_text([pair | {"peak_memory_bytes": 2**20}]).splitlines()[2]
    assert "10.00 to 12.00" in line
    assert "1.00 MiB" in line
    assert line.endswith("  –")
    assert "±" not in line


def test_long_names_of_layers_are_not_cut():
    name = "encoder.layers.encoder_layer_11.self_attention.out_proj.very.long.name"
    rows = [
        {"index": 1, "name": name, "kind": "Linear", "weight": (8, 4), "parameters": 40, "flops": 64, "followers": ()}
    ]
    assert name in layers_text(rows)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-:--"), (0.04, "0:00"), (59.6, "1:00"), (185, "3:05"), (3723, "1:02:03"), (360_000, "100:00:00")],
)
def test_the_clock(seconds, text):
    assert clock(seconds) == text


def watch(display: Display) -> None:
    arms = [Arm("stochastic-depth", 0), Arm("sgd", 0)]
    with display:
        display.note("a note with [brackets]")
        display.begin(arms, [0, 1], 4)
        display.step(arms[0], Progress(0, 4, 5, 10, 1.25, 2, 21, 12_345.6, 3.0))
        record = {"epoch": 1, "train_loss": 0.5, "top1_error": 12.5, "boundary": 3, "layers": 21}
        display.epoch(arms[1], record | {"images_per_second": 800.0})


@pytest.fixture
def screen(monkeypatch):
    """What is written to a terminal of 80 columns."""
    screen = io.StringIO()
    monkeypatch.setenv("TERM", "xterm-256color")  # a dumb terminal gets plain lines
    made = Console(file=screen, force_terminal=True, width=80, height=24, color_system=None)
    monkeypatch.setattr("lowcal.console.Console", lambda **options: made)
    return screen


def drawn(display):
    """The live lines."""
    stream = io.StringIO()
    Console(file=stream, width=80, color_system=None).print(display._draw())
    return stream.getvalue().splitlines()


def test_a_terminal_gets_lines_that_fit_and_vanish(screen):
    display = Display()
    watch(display)
    lines = drawn(display)
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80
    assert "loss 1.250  boundary 2/21  12,346 img/s" in lines[0]
    assert "3/4" in lines[1]


def test_a_terminal_keeps_a_line_per_epoch(screen):
    watch(Display())
    kept = [line for line in screen.getvalue().splitlines() if "error" in line]
    assert len(kept) == 1
    assert kept[0].endswith("sgd-seed0               2/4  loss 0.5000  error 12.50 %  boundary 3/21")


def test_a_stage_has_a_label_and_a_bar_and_needs_no_arms(screen):
    with Display() as display:
        assert drawn(display) == ["starting"]
        display.stage("decoding", 1500, 60_000)
        (line,) = drawn(display)
        assert line.startswith("decoding  ")
        assert line.rstrip().endswith("1,500/60,000")
        display.stage("local-seed0: warming up and choosing the step")
        assert drawn(display) == ["local-seed0: warming up and choosing the step"]
    assert "warming up" in screen.getvalue()


def test_a_stage_is_not_printed_to_a_file(capsys):
    with Display() as display:
        display.stage("decoding", 1, 2)
    assert capsys.readouterr().out == ""


def test_the_time_left_is_shown_when_it_is_known(screen, monkeypatch):
    """10 epochs of 100 s each, and a warm-up of an hour that does not count."""
    now = [0.0]
    monkeypatch.setattr("lowcal.console.time.monotonic", lambda: now[0])
    arm, shown = Arm("sgd", 0), []

    def step(seconds, part):
        now[0] = seconds
        display.step(arm, Progress(0, 10, int(100 * part), 100, 1.0, 0, 3, 10.0, 0.0))
        shown.append(drawn(display)[-1].partition(" left")[0])

    display = Display()
    display.begin([arm], [0], 10)
    display.stage("warming up")
    now[0] = 3600.0
    display.stage("")
    step(3601.0, 0.002)  # a first step is slow
    step(3604.9, 0.04)
    step(3610.0, 0.1)
    now[0] = 3700.0
    record = {"epoch": 0, "train_loss": 0.5, "top1_error": 12.5, "boundary": 0, "layers": 3, "images_per_second": 8.0}
    display.epoch(arm, record)
    shown.append(drawn(display)[-1].partition(" left")[0])
    assert shown == ["-:--", "-:--", "16:30", "15:00"]


@pytest.mark.parametrize("variable", [None, "NO_COLOR"])
def test_colour_is_left_out_on_request(monkeypatch, variable):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if variable:
        monkeypatch.setenv(variable, "1")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, height=24, legacy_windows=False)
    monkeypatch.setattr("lowcal.console.Console", lambda **options: console)
    display = Display()
    display.begin([Arm("sgd", 0)], [1], 4)
    console.print(display._draw())
    assert (re.search(r"\x1b\[[0-9;]*3[0-9]", screen.getvalue()) is None) == (variable is not None)


def test_a_file_gets_one_plain_line_per_epoch(capsys):
    watch(Display())
    note, line = capsys.readouterr().out.splitlines()
    assert note == "a note with [brackets]"
    assert line.startswith("sgd-seed0               2/4  loss 0.5000  error 12.50 %  boundary 3/21  800 img/s  ")


def test_quiet_shows_nothing(capsys):
    watch(Display(quiet=True))
    assert capsys.readouterr().out == ""
