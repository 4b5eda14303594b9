"""The one interface of loggers, and how a training is kept safe from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class LoggedRun:
    """What a logger is told of a run when it starts or goes on.

    Attributes:
        name: for people.
        folder: of the run, on this machine; a logger keeps here what it must find after a resume.
        settings: what the run's YAML may say, nested; its inputs are in config.json.
        resumed_from: step of the checkpoint; 0 at the start. What was logged of later steps, before
            a kill, comes again.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    resumed_from: int


class RunLogger(Protocol):
    """A place for the numbers of one run at a time. It may raise anything: see `Loggers`."""

    name: str

    def start(self, run: LoggedRun) -> None:
        """Before the first step of this process."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Means over the steps that end with `step`, or the scores of a validation."""

    def finish(self, picture: Path, *, well: bool) -> None:
        """After the last step of this process.

        Args:
            picture: progress.png; may be absent.
            well: whether no error ended it; a run that a signal stopped ended well.
        """


class Loggers:
    """Several loggers as one that never raises.

    A full disk or a lost network costs one warning; that logger is then left out, and the training
    goes on.

    Args:
        loggers: in the order in which they are told.
        warn: hears of failures.
    """

    def __init__(self, loggers: Iterable[RunLogger], warn: Callable[[str], None]) -> None:
        self._loggers = list(loggers)
        self._warn = warn

    def start(self, run: LoggedRun) -> None:
        """See `RunLogger.start`."""
        self._each(lambda logger: logger.start(run))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `RunLogger.scalars`."""
        self._each(lambda logger: logger.scalars(step, values))

    def finish(self, picture: Path, *, well: bool) -> None:
        """See `RunLogger.finish`."""
        self._each(lambda logger: logger.finish(picture, well=well))

    def _each(self, tell: Callable[[RunLogger], None]) -> None:
        for logger in list(self._loggers):
            try:
                tell(logger)
            except Exception as error:  # whatever a package of somebody else raises
                self._loggers.remove(logger)
                self._warn(
                    f"logger {logger.name} failed ({type(error).__name__}: {error}). The training "
                    "goes on without it; metrics.jsonl has all numbers."
                )


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`{"a": {"b": 1}}` -> ("a.b", "1"): as most loggers want settings."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat_settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
