"""What a person looks at: progress.png while a run trains, a table of validations after it."""

from __future__ import annotations

from pathlib import Path

from pipeline.figures import save_curves
from pipeline.folder import Folder
from pipeline.log import Log
from pipeline.student.history import History
from pipeline.student.metrics_file import metric_lines
from pipeline.student.progress import Metrics


def draw_progress(path: Path, metrics: Metrics) -> None:
    """Loss terms, validation Dice and throughput against steps, as a PNG.

    A picture that cannot be drawn costs a warning, not the training.
    """
    history, failed = metrics.history, None
    try:
        save_curves(
            path,
            {name: curve.points for name, curve in history.terms.items()},
            {organ: curve.points for organ, curve in history.dice.items()},
            samples_per_second=history.samples_per_second.points,
            data_wait=history.data_wait.points,
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
    names = [*history.last_validation, "mean"]
    if history.scores:
        steps = {history.scores[n].first[0] for n in history.scores}
        columns = ["organ", f"first (step {min(steps)})", "best", "at step"]
        rows = [_row(history, name) for name in names]
        log.table(f"{where.name}: validation Dice", [*columns, f"last (step {history.step})"], rows)
    log.info(f"{where}: progress.png, metrics.jsonl, checkpoints/")


def _row(history: History, name: str) -> list[str]:
    found = history.scores.get(name)
    if found is None:
        return [name, "-", "-", "-", "-"]
    best, at = f"{found.best[1]:.3f}", str(found.best[0])
    return [name, f"{found.first[1]:.3f}", best, at, f"{found.last[1]:.3f}"]
