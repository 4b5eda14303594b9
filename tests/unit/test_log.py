"""What people and machines are told, where nobody watches."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.text import Text

from pipeline.folder import read_text, sizes
from pipeline.log import Log, print_table, size
from stages.compare.budget import StepClock
from website.screens import ROOT
from website.terminal import run

if TYPE_CHECKING:
    from upath import UPath


class Clock:
    """A `time.monotonic` that only moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines on standard error, after their time stamps; nothing is on standard output."""
    out, err = capsys.readouterr()
    assert out == ""
    found = [re.fullmatch(r"\d\d:\d\d:\d\d (.*)", line) for line in err.splitlines()]
    assert all(found), err
    return [match[1] for match in found if match]


def test_lines_have_a_time_stamp_and_keep_their_brackets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = Log()
    assert not log.is_terminal
    log.info("case [a] is [bold]done[/bold] " + "x" * 300)
    log.warn("mind the gap")
    assert lines(capsys) == [
        "case [a] is [bold]done[/bold] " + "x" * 300,
        "warning: mind the gap",
    ]


def test_quiet_shows_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(quiet=True)
    log.info("not shown")
    with log.progress("cases", 2) as advance:
        advance()
        advance("a", 1)
    log.warn("shown")
    assert lines(capsys) == ["warning: shown"]


def test_a_remark_is_said_once_also_by_who_goes_on_with_the_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = Log(quiet=True)
    clock = StepClock(log)  # what a comparison gives each of its trainings
    for each in (log, clock, clock, log):
        each.remark("teacher two adds nothing here")
    clock.remark("another")
    log.warn("each time")
    log.warn("each time")
    said = ["teacher two adds nothing here", "another", "each time", "each time"]
    assert lines(capsys) == [f"warning: {text}" for text in said]


def test_progress_is_a_line_soon_then_every_minute_and_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Log().progress("cases", 100) as advance:
        for _ in range(99):
            clock.now += 2
            advance("note", 1)
        clock.now += 2
        advance("last")
    assert lines(capsys) == [
        "cases: 3/100, 6 s spent, 3 min left, note",
        "cases: 33/100, 66 s spent, 2 min left, note",
        "cases: 63/100, 2 min spent, 74 s left, note",
        "cases: 93/100, 3 min spent, 14 s left, note",
        "cases: 100/100, 3 min spent, 0 s left, last",
    ]


def test_several_steps_at_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Log().progress("windows", 100) as advance:
        clock.now += 60
        advance(steps=25)
    assert lines(capsys) == ["windows: 25/100, 60 s spent, 3 min left"]


def test_what_was_done_before_does_not_make_it_look_fast(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Log().progress("steps", 1000, done=900) as advance:
        clock.now += 20
        advance(steps=10)
    assert lines(capsys) == ["steps: 910/1000, 20 s spent, 3 min left"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7, "7 s"), (100, "2 min"), (5950, "99 min"), (6000, "1 h 40 min"), (190_000, "2 d 4 h")],
)
def test_time_as_a_person_says_it(
    clock: Clock, capsys: pytest.CaptureFixture[str], seconds: float, text: str
) -> None:
    with Log().progress("steps", 2) as advance:
        clock.now += seconds
        advance()
    assert lines(capsys) == [f"steps: 1/2, {text} spent, {text} left"]


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_events_too(clock: Clock, tmp_path: Path, quiet: bool) -> None:
    with Log(quiet=quiet, events=tmp_path / "events.jsonl").progress("steps", 10) as advance:
        for _ in range(10):
            clock.now += 20
            advance("loss 1")
    found = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(line["event"], line["done"]) for line in found] == [
        ("progress", n) for n in (1, 4, 7, 10)
    ]
    assert found[1].items() >= {
        "what": "steps", "total": 10, "seconds": 80.0, "seconds_left": 120.0, "note": "loss 1",
    }.items()  # fmt: skip


def test_a_terminal_has_a_bar_with_the_same_numbers_and_no_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    log = Log(events=tmp_path / "events.jsonl")
    assert log.is_terminal
    with log.progress("steps", 12, done=10) as advance:
        advance("loss 0.5")
        advance("loss 0.4")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert re.search(r"steps .* 12/12 0:00:00 left 0:00:00 loss 0.4", shown)
    assert "spent" not in shown
    assert json.loads((tmp_path / "events.jsonl").read_text())["done"] == 12


def test_a_table_for_people_is_on_standard_error_unless_quiet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for quiet in (False, True):
        Log(quiet=quiet).table("Dice", ["organ", "last"], [["liver", "0.91"]])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("liver") == 1


def test_events_are_one_json_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "events.jsonl"
    log = Log(quiet=True, events=path)
    log.event("unit", path=tmp_path, text="two\nlines", dice=0.5)
    log.event("unit", dice=float("nan"), low=-float("inf"))
    log.warn("careful")
    Log(events=path).event("again")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    found = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [record.pop("event") for record in found] == ["unit", "unit", "warning", "again"]
    assert all(record.pop("time") > 1.6e9 for record in found)
    assert found == [
        {"path": str(tmp_path), "text": "two\nlines", "dice": 0.5},
        {"dice": None, "low": None},
        {"text": "careful"},
        {},
    ]


def test_a_table_goes_to_standard_output_unwrapped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    name = "a-rather-long-name-of-a-case-" + "x" * 50
    print_table("Scores", ["case", "Dice"], [[name, "0.91"], ["[b]", "-"]])
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0].strip() == "Scores"
    (row,) = [line for line in out.splitlines() if name in line]
    assert "0.91" in row
    assert "[b]" in out


@pytest.mark.parametrize(("width", "broken"), [(48, False), (40, True)])
def test_a_table_on_a_terminal_breaks_words_only_where_they_do_not_fit(
    width: int, broken: bool
) -> None:
    """What a person sees: a terminal is narrow, and a word cut in two is hard to read."""
    columns = ["teacher", "kind", "organ: its channels", "tap: channels, cells"]
    row = ["kidneys", "checkpoint", "kidneys: 1", "body: 8"]
    command = f"from pipeline.log import print_table\nprint_table('T', {columns}, [{row}])"
    # A width or a terminal that the environment names would count for more than the real one.
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    environment = kept | {"TERM": "xterm"}
    lines, code = run([sys.executable, "-c", command], ROOT, width, environment)
    assert code == 0
    text = [Text.from_ansi(line).plain for line in lines]
    assert max(map(len, text)) <= width
    words = set(re.findall(r"[a-z]+", "\n".join(text)))
    assert (not set(re.findall(r"[a-z]+", " ".join(columns + row))) <= words) == broken


def test_events_in_an_object_store_are_an_object_of_this_process(
    store_work: UPath,
) -> None:
    """Nothing can be appended to there: each process renews its own."""
    for nth in range(2):
        log = Log(quiet=True, events=store_work / "events.jsonl")
        log.begin(number=nth)
        log.event("first", value=float("nan"))
        log.end()
    names = sizes(store_work)
    assert len(names) == 2
    assert all(name.startswith("events/") for name in names)
    texts = [read_text(store_work / name) for name in names]
    told = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert all([line["event"] for line in lines] == ["begin", "first", "end"] for lines in told)
    assert sorted(lines[0]["number"] for lines in told) == [0, 1]
    assert all(lines[1]["value"] is None for lines in told)


@pytest.mark.parametrize(
    ("num_bytes", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (2_550_000, "2.55 MB"),
        (120e9, "120 GB"),
        (4e12, "4 TB"),
    ],
)
def test_sizes(num_bytes: float, said: str) -> None:
    assert size(num_bytes) == said
