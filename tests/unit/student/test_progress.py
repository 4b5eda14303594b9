"""metrics.jsonl and what is kept of it in memory; the training itself is in test_training.py."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from pipeline.log import Log
from pipeline.student import progress
from pipeline.student.progress import (
    CAPACITY,
    Curve,
    History,
    Metrics,
    kept_lines,
    metric_lines,
    show_validations,
    without_timing,
)


class Clock:
    """A `time.monotonic` that only moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def step_line(step: int, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    terms = {"dice": loss / 4, "cross_entropy": loss * 3 / 4}
    return {"step": step, "loss": loss, "terms": terms, "lr": 0.1, "gradient_norm": 2.0, **more}


def add(metrics: Metrics, step: int, loss: float = 1.0) -> None:
    line = step_line(step, loss)
    metrics.add(line.pop("step"), **line)


def write(path: Path, *lines: dict[str, Any], tail: str = "") -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


class TestFile:
    def test_lines_behind_the_checkpoint_are_cut_off_and_no_other_is_touched(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "metrics.jsonl"
        write(path, step_line(1), step_line(2))
        kept = path.read_bytes()
        inode = path.stat().st_ino
        write(path, step_line(1), step_line(2), step_line(3), tail='{"step": 4, "lo')
        assert [line["step"] for line in kept_lines(path, 2)] == [1, 2]
        assert path.read_bytes() == kept
        # Cut, not written anew: there is no moment without the lines that are kept.
        assert path.stat().st_ino == inode

    def test_a_file_with_nothing_to_cut_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        write(path, step_line(1), step_line(2))
        os.utime(path, ns=(5, 5))
        Metrics(path, keep_until=2)
        assert path.stat().st_mtime_ns == 5

    @pytest.mark.parametrize("tail", ['{"step": 3, "loss"', "[3]\n", '{"loss": 1}\n', "\xff\n"])
    def test_it_ends_before_what_is_no_line(self, tmp_path: Path, tail: str) -> None:
        path = tmp_path / "metrics.jsonl"
        write(path, step_line(1), step_line(2), tail=tail)
        assert [line["step"] for line in metric_lines(path)] == [1, 2]
        metrics = Metrics(path, keep_until=9)
        add(metrics, 3)
        metrics.flush()
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]

    def test_a_last_line_without_its_end_is_kept_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        write(path, step_line(1), tail=json.dumps(step_line(2)))
        metrics = Metrics(path, keep_until=2)
        add(metrics, 3)
        metrics.flush()
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]

    def test_only_the_clock_is_left_out_of_comparisons(self) -> None:
        slow = step_line(1, timing={"seconds": 9.0})
        assert without_timing([slow]) == without_timing([step_line(1)]) == [step_line(1)]
        assert without_timing([slow]) != without_timing([step_line(1, loss=1.000001)])


class TestTiming:
    def test_waiting_and_throughput_of_a_window(self, tmp_path: Path, clock: Clock) -> None:
        path = tmp_path / "run" / "metrics.jsonl"
        metrics = Metrics(path, keep_until=0, batch_size=3)

        def slow_loader() -> Any:
            for number in range(progress.WINDOW_STEPS + 1):
                clock.now += 0.1
                yield number

        for step, _ in enumerate(metrics.batches(slow_loader()), 1):
            clock.now += 0.3
            add(metrics, step, loss=0.5)
        assert metrics.note == "loss 0.500, 7.5 samples/s, 25% waiting for data"
        lines = list(metric_lines(path))
        # The last step's window is still open.
        assert len(lines) == progress.WINDOW_STEPS
        assert [line.get("timing") for line in lines[:-1]] == [None] * (len(lines) - 1)
        assert lines[-1]["timing"] == {
            "steps": 20, "seconds": 8.0, "data_wait": 0.25, "samples_per_second": 7.5,
        }  # fmt: skip

    def test_slow_steps_are_written_by_the_clock(self, tmp_path: Path, clock: Clock) -> None:
        path = tmp_path / "metrics.jsonl"
        metrics = Metrics(path, keep_until=0)
        for step, _ in enumerate(metrics.batches(range(3)), 1):
            clock.now += 6
            add(metrics, step)
        assert [line["step"] for line in metric_lines(path)] == [1, 2]

    def test_validation_is_not_part_of_the_throughput(self, tmp_path: Path, clock: Clock) -> None:
        path = tmp_path / "metrics.jsonl"
        metrics = Metrics(path, keep_until=0)
        for step, _ in enumerate(metrics.batches(range(2)), 1):
            clock.now += 1
            add(metrics, step)
            clock.now += 50
            metrics.add_validation(step, {"liver": 0.5})
        found = [line["timing"] for line in metric_lines(path)]
        step = {"steps": 1, "seconds": 1.0, "data_wait": 0.0, "samples_per_second": 1.0}
        assert found == [step, {"seconds": 50.0}] * 2

    def test_a_note_before_anything_happened(self, tmp_path: Path) -> None:
        assert Metrics(tmp_path / "metrics.jsonl", keep_until=0).note == ""


class TestHistory:
    def test_a_curve_stays_small_and_keeps_the_mean(self) -> None:
        curve = Curve()
        for step in range(1, 250_001):
            curve.add(step, float(step % 10))
        points = curve.points
        assert CAPACITY / 2 <= len(points) <= CAPACITY
        assert all(3 < value < 6 for _, value in points)
        assert points[0][0] == pytest.approx(125_000 / len(points), rel=0.5)
        assert points[-1][0] > 249_000
        assert [step for step, _ in points] == sorted(step for step, _ in points)

    @pytest.mark.parametrize("count", [1, 2, CAPACITY - 1, CAPACITY, CAPACITY + 1])
    def test_no_value_is_lost(self, count: int) -> None:
        curve = Curve()
        for step in range(count):
            curve.add(step, step)
        if count < CAPACITY:
            assert curve.points == [(step, step) for step in range(count)]
        else:
            whole = CAPACITY // 2
            total = sum(2 * v for _, v in curve.points[:whole])
            total += sum(v for _, v in curve.points[whole:])
            assert total == pytest.approx(sum(range(count)))

    def test_after_a_resume_it_is_the_same(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        metrics = Metrics(path, keep_until=0)
        for step in range(1, 8):
            add(metrics, step, loss=1 / step)
            if step % 3 == 0:
                metrics.add_validation(step, {"liver": step / 10, "spleen": None})
        metrics.flush()
        again = Metrics(path, keep_until=7).history
        for name in ("total", "dice", "cross_entropy"):
            assert again.terms[name].points == metrics.history.terms[name].points
            assert len(again.terms[name].points) == 7
        assert again.scores == metrics.history.scores
        assert again.last_validation == {"liver": 0.6, "spleen": None}
        assert again.smooth_loss == pytest.approx(metrics.history.smooth_loss, abs=1e-5)

    def test_the_best_is_the_first_of_equals(self) -> None:
        history = History()
        for step, dice in ((10, 0.2), (20, 0.9), (30, 0.9), (40, 0.5)):
            history.add({"step": step, "validation_dice": {"liver": dice, "spleen": None}})
        found = history.scores["liver"]
        assert (found.first, found.best, found.last) == ((10, 0.2), (20, 0.9), (40, 0.5))
        assert history.scores["mean"] == found
        assert "spleen" not in history.scores


class TestPicture:
    def test_one_that_cannot_be_drawn_costs_one_warning(self, tmp_path: Path) -> None:
        said: list[str] = []
        metrics = Metrics(tmp_path / "metrics.jsonl", keep_until=0, warn=said.append)
        (tmp_path / "file").touch()
        for _ in range(2):
            metrics.draw(tmp_path / "file" / "progress.png")
        assert len(said) == 1
        assert "progress.png" in said[0]

    def test_it_is_old_after_a_minute(self, tmp_path: Path, clock: Clock) -> None:
        metrics = Metrics(tmp_path / "metrics.jsonl", keep_until=0)
        assert not metrics.picture_is_old
        clock.now += 61
        assert metrics.picture_is_old
        metrics.draw(tmp_path / "progress.png")
        assert not metrics.picture_is_old

    def test_it_names_the_run_and_shows_what_the_history_has(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shown: list[Figure] = []

        def keep(figure: Figure, path: Path, **_: object) -> None:
            shown.append(figure)
            Path(path).touch()

        monkeypatch.setattr(Figure, "savefig", keep)
        path = tmp_path / "ms_kd" / "metrics.jsonl"
        path.parent.mkdir()
        timing = {"steps": 1, "seconds": 2.0, "data_wait": 0.5, "samples_per_second": 4.0}
        write(path, step_line(1, timing=timing), {"step": 1, "validation_dice": {"liver": 0.5}})
        Metrics(path, keep_until=1).draw(tmp_path / "x.png", {"liver": 7})
        assert shown[0].get_suptitle() == "ms_kd, step 1"
        curves = {
            ax.get_title(): {tuple(line.get_ydata()) for line in ax.get_lines()}
            for ax in shown[0].axes
        }
        assert curves == {
            "Training loss, weighted terms": {(1.0,), (0.25,), (0.75,)},
            "Validation, labelled organs": {(0.5,)},
            "Throughput": {(4.0,)},
            "Waiting for data": {(50.0,)},
        }


class TestTable:
    def test_first_best_and_last_of_each_organ_and_where_things_are(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "metrics.jsonl"
        scores = [(10, 0.25, 0.5), (20, 0.75, 0.5), (30, 0.5, 0.25)]
        write(
            path, step_line(1),
            *(
                {"step": n, "validation_dice": {"liver": a, "aorta": b, "spleen": None}}
                for n, a, b in scores
            ),
        )  # fmt: skip
        show_validations(Log(), path, tmp_path / "students" / "ms_kd")
        text = capsys.readouterr().err
        cells = [line.replace("│", " ").split() for line in text.splitlines()]
        assert ["liver", "0.250", "0.750", "20", "0.500"] in cells
        assert ["aorta", "0.500", "0.500", "10", "0.250"] in cells
        assert ["spleen", "-", "-", "-", "-"] in cells
        assert ["mean", "0.375", "0.625", "20", "0.375"] in cells
        assert "first (step 10)" in text
        assert "last (step 30)" in text
        assert "students/ms_kd: progress.png" in text

    def test_one_validation_of_one_organ_is_one_number(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "metrics.jsonl"
        write(path, step_line(9), {"step": 9, "validation_dice": {"liver": 0.5}})
        show_validations(Log(), path, tmp_path)
        text = capsys.readouterr().err
        cells = [line.replace("│", " ").replace("┃", " ").split() for line in text.splitlines()]
        assert ["organ", "step", "9"] in cells
        assert ["liver", "0.500"] in cells
        assert "mean" not in text

    def test_no_validation_no_table(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "metrics.jsonl"
        write(path, step_line(1), {"step": 1, "validation_dice": {"liver": None}})
        show_validations(Log(), path, tmp_path)
        assert "Dice" not in capsys.readouterr().err
