"""What a person looks at: progress.png while a run trains, a table of validations after it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.folder import Folder
from pipeline.log import Log
from pipeline.student.curves import save_curves
from pipeline.student.history import History
from pipeline.student.metrics_file import metric_lines
from pipeline.student.progress import Metrics


def draw_progress(path: Path, metrics: Metrics, ids: Mapping[str, int] | None = None) -> None:
    """Loss terms, validation Dice and throughput against steps, as a PNG.

    A picture that cannot be drawn costs a warning, not the training. `ids`: of the organs, for
    their colours.
    """
    history, failed = metrics.history, None
    try:
        save_curves(
            path,
            {name: curve.points for name, curve in history.terms.items()},
            {organ: curve.points for organ, curve in history.dice.items()},
            samples_per_second=history.samples_per_second.points,
            data_wait=history.data_wait.points,
            ids=ids,
            title=f"{metrics.name}, step {history.step:,}",
        )
    except Exception as error:  # whatever a drawing library raises, and a full disk
        failed = f"{path} cannot be drawn ({error}); the training goes on."
    metrics.picture_drawn(failed)


def tell_validations(log: Log, metrics: Path, where: Folder) -> None:
    """A table of first, best and last validation Dice per organ, and where the run's files are.

    Args:
        log: for people.
        metrics: metrics.jsonl of the run.
        where: the run's folder as the user knows it.
    """
    if log.quiet:
        return
    history = History()
    for line in metric_lines(metrics):
        history.add(line)
    columns, rows = _table(history)
    if rows:
        log.table(f"{where.name}: validation Dice", columns, rows)
    log.info(f"{where}: progress.png, metrics.jsonl, checkpoints/")


def _table(history: History) -> tuple[list[str], list[list[str]]]:
    """First, best and last; a single validation is all three."""
    if not history.scores:
        return [], []
    organs = list(history.last_validation)
    first = min(scores.first[0] for scores in history.scores.values())
    if first == history.step:
        columns = ["organ", f"step {first}"]
    else:
        columns = ["organ", f"first (step {first})", "best", "at step"]
        columns.append(f"last (step {history.step})")
    rows = []
    for name in organs if len(organs) == 1 else [*organs, "mean"]:
        found = history.scores.get(name)
        cells = ["-"] * 4
        if found is not None:
            best, at = found.best[1], found.best[0]
            cells = [f"{found.first[1]:.3f}", f"{best:.3f}", str(at), f"{found.last[1]:.3f}"]
        rows.append([name, *cells][: len(columns)])
    return columns, rows
