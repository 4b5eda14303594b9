"""What people and machines are told while work runs.

People: rich on a terminal, plain lines with a time stamp elsewhere (a Slurm log, a pipe).
Machines: one JSON object per line in `events.jsonl`.
"""

from __future__ import annotations

import atexit
import csv
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, Protocol, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pipeline.folder import Folder, is_local, replace_file, writer_name

SECONDS_BEFORE_THE_FIRST_LINE = 5.0
SECONDS_BETWEEN_LINES = 60.0
SECONDS_BETWEEN_LINES_IF_VERBOSE = 5.0
SECONDS_BETWEEN_SENDS = 30.0


class Log:
    """Lines and progress on standard error, so that standard output stays for results.

    Args:
        quiet: only warnings and errors.
        verbose: also details, and more lines of progress.
        events: file to append machine-readable events to; None writes none. In an object store,
            where nothing can be appended to, each process writes an object of its own,
            `events/<time>~<host>~<pid>~<digits>.jsonl`, and renews it every half minute.
    """

    def __init__(
        self, *, quiet: bool = False, verbose: bool = False, events: Folder | None = None
    ) -> None:
        self.quiet = quiet
        self.verbose = verbose and not quiet
        self.events = events
        self._first: dict[str, Any] | None = None
        self._remarks: set[str] = set()
        self._unsent: list[str] = []
        self._sent_at = time.monotonic()
        if events is not None and not is_local(events):
            now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            self.events = events.with_suffix("") / f"{now}~{writer_name()}.jsonl"
            atexit.register(self._send_last)
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)

    @property
    def is_terminal(self) -> bool:
        """Whether a person is watching."""
        return self._console.is_terminal

    def info(self, text: str) -> None:
        """A line for people; dropped when quiet."""
        if not self.quiet:
            self._line(text)

    def detail(self, text: str) -> None:
        """A line for people who want to see everything; dropped otherwise."""
        if self.verbose:
            self._line(text, style="dim")

    def warn(self, text: str) -> None:
        """A line that is shown even when quiet."""
        self._line(f"warning: {text}", style="yellow")
        self.event("warning", text=text)

    def remark(self, text: str) -> None:
        """A warning of what is read, said once however often it is read."""
        if text not in self._remarks:
            self._remarks.add(text)
            self.warn(text)

    def event(self, kind: str, **fields: Any) -> None:
        """Appends one JSON line with the time (seconds since the epoch) and the kind.

        NaN and infinity, which JSON does not know, are written as null.
        """
        if self.events is None:
            return
        if self._first is not None:
            first, self._first = self._first, None
            self.event("begin", **first)
        known = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in fields.items()
        }
        record = {"time": round(time.time(), 3), "event": kind, **known}
        try:
            self._append(self.events, json.dumps(record, default=str) + "\n")
        except OSError as error:  # a full disk must not also stop what can still be done
            lost, self.events = self.events, None
            reason = error.strerror or error
            self.warn(f"{lost} cannot be written ({reason}): no more events are kept.")

    def begin(self, **fields: Any) -> None:
        """What runs, as an event before the first other one: a command that does nothing, or whose
        work folder is not there, leaves none."""
        self._first = fields

    def end(self, **fields: Any) -> None:
        """How it ended, as an event, if there was a first one."""
        if self.events is None or self._first is not None:
            return
        self.event("end", **fields)
        if not is_local(self.events):
            self._send_last()

    def _append(self, events: Folder, line: str) -> None:
        if is_local(events):
            events.parent.mkdir(parents=True, exist_ok=True)
            with events.open("a", encoding="utf-8") as file:
                file.write(line)
            return
        self._unsent.append(line)
        if time.monotonic() - self._sent_at > SECONDS_BETWEEN_SENDS:
            self._send(events)

    def _send(self, events: Folder) -> None:
        replace_file(events, "".join(self._unsent).encode())
        self._sent_at = time.monotonic()

    def _send_last(self) -> None:
        if self.events is not None and self._unsent:
            with suppress(OSError):
                self._send(self.events)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table for people; dropped when quiet."""
        if not self.quiet:
            print_table(title, columns, rows, file=sys.stderr)

    @contextmanager
    def progress(self, what: str, total: int, *, done: int = 0) -> Iterator[Advance]:
        """Progress with an ETA: a bar on a terminal, timed lines elsewhere, events for machines.

        Lines and events come after a few seconds, then every minute, and at the end.

        Args:
            done: how many of them were made before, and say nothing about speed.
        """
        report = _Advance(self, what, total, done)
        if self.quiet or not self.is_terminal:
            yield report
            return
        with self._bar() as bar:
            task = bar.add_task(what, total=total, completed=done, note="")

            def advance(note: str = "", steps: int = 1) -> None:
                bar.update(task, advance=steps, note=note)
                report(note, steps)

            yield advance

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            speed_estimate_period=600,  # s; pauses, such as validations, count too
        )

    def _line(self, text: str, *, style: str | None = None) -> None:
        with suppress(OSError):  # a log on a full disk must not stop the work
            if self.is_terminal:
                self._console.print(text, style=style, markup=False)
            else:
                now = time.strftime("%H:%M:%S")
                print(f"{now} {text}", file=sys.stderr, flush=True)  # noqa: T201


class Advance(Protocol):
    """Reports that `steps` more are done; `note` names the case or the loss."""

    def __call__(self, note: str = "", steps: int = 1) -> None:
        """Moves the bar or, where nobody watches, prints a line when one is due."""


class _Advance:
    """Progress as events, and as lines unless a bar shows it."""

    def __init__(self, log: Log, what: str, total: int, done: int) -> None:
        self._log, self._what, self._total = log, what, total
        self._before = self._done = done
        self._began = time.monotonic()
        self._due = self._began + SECONDS_BEFORE_THE_FIRST_LINE
        self._pause = SECONDS_BETWEEN_LINES_IF_VERBOSE if log.verbose else SECONDS_BETWEEN_LINES

    def __call__(self, note: str = "", steps: int = 1) -> None:
        self._done += steps
        now = time.monotonic()
        if now < self._due and self._done < self._total:
            return
        self._due = now + self._pause
        spent = now - self._began
        left = spent / max(1, self._done - self._before) * (self._total - self._done)
        if not self._log.is_terminal:
            self._log.info(
                f"{self._what}: {self._done}/{self._total}, {duration(spent)} spent, "
                f"{duration(left)} left{', ' + note if note else ''}"
            )
        self._log.event(
            "progress", what=self._what, done=self._done, total=self._total,
            seconds=round(spent, 1), seconds_left=round(left, 1), note=note,
        )  # fmt: skip


def duration(seconds: float) -> str:
    """As a person says it: 95 s, 12 min, 3 h 20 min, 2 d 5 h."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def size(num_bytes: float) -> str:
    """Bytes in powers of 1000: 999 B, 2.55 MB, 120 GB."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if abs(value) < 999.5 or unit == "PB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if value >= 99.5 or unit == "B" else f"{value:.3g} {unit}"


def number(value: float | None, form: str = ".3f") -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else format(value, form)


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """A header, by default of the first row's keys, and a line for each row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or list(rows[0] if rows else ()), lineterminator="\n")
    if writer.fieldnames:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    num_text: int = 1,
    file: TextIO | None = None,
) -> None:
    """A table, on standard output if nothing else is said; but for the first `num_text`, columns
    are right-aligned."""
    file = file or sys.stdout
    width = None if file.isatty() else max(120, int(os.environ.get("COLUMNS", "0")))
    console = Console(file=file, width=width, highlight=False, markup=False)
    table = Table(title=title, title_justify="left", show_header=any(columns))
    room = console.width - 3 * len(columns) - 1
    for index, (name, wide) in enumerate(zip(columns, _widths(columns, rows, room), strict=True)):
        justify: Literal["left", "right"] = "left" if index < num_text else "right"
        table.add_column(name, justify=justify, overflow="fold", width=wide)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _widths(
    columns: Sequence[str], rows: Sequence[Sequence[str]], room: int
) -> list[int] | list[None]:
    """Characters for each column so that no word is broken; None, and rich decides, where all fits
    as it is or where not even the words do. Names of columns give way first, then the widest."""
    cells = [[row[n] for row in rows] for n in range(len(columns))]
    inner = [_longest(column, "\n") for column in cells]
    least = [_longest([name, *column], None) for name, column in zip(columns, cells, strict=True)]
    whole = [max(wide, cell_len(name)) for wide, name in zip(inner, columns, strict=True)]
    if sum(whole) <= room or sum(least) > room:
        return [None] * len(columns)
    widths = [min(room, wide) for wide in whole]
    while sum(widths) > room:
        gives = [(w > m, w > n, w) for w, m, n in zip(widths, least, inner, strict=True)]
        widths[gives.index(max(gives))] -= 1
    return widths


def _longest(cells: Sequence[str], separator: str | None) -> int:
    return max((cell_len(part) for cell in cells for part in cell.split(separator)), default=0)
