"""What a stage works on, and what it did: for people, machines and the exit code."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.registry import Registry
from pipeline.errors import PipelineError, kind_of, listed
from pipeline.folder import Folder
from pipeline.log import Log

_APART = 3  # failures alike that are named one by one


@dataclass(frozen=True)
class Scope:
    """What a stage works on, where to, and who hears of it."""

    registry: Registry
    work: Folder
    log: Log
    tables: bool = True


@dataclass
class StageReport:
    """Units done, skipped and failed.

    Attributes:
        warnings: unit -> what is improbable in it, or wrong with its input though it was done.
        to_mend: those whose input is certainly wrong.
        signalled: a signal to stop came, though all may be done: the caller begins nothing else.
        details: what else this stage has to tell, as plain JSON values.
    """

    stage: str
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, Exception] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    to_mend: list[str] = field(default_factory=list)
    seconds: float = 0.0
    num_bytes: int = 0
    signalled: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 all done; 2 if all that went wrong is the user's input to mend; else 1."""
        codes = {
            error.exit_code if isinstance(error, PipelineError) else 1
            for error in self.failed.values()
        }
        if self.to_mend:
            codes.add(2)
        if not codes:
            return 0
        return 2 if codes == {2} else 1

    @contextmanager
    def timed(self) -> Iterator[StageReport]:
        """`seconds` are those of the block."""
        began = time.monotonic()
        try:
            yield self
        finally:
            self.seconds = time.monotonic() - began

    def failures(self) -> list[tuple[str, Exception]]:
        """Which units failed, and why; many that failed alike are named together."""
        alike: dict[str, list[str]] = {}
        for unit, error in self.failed.items():
            alike.setdefault(f"{type(error)} {kind_of(str(error), unit)}", []).append(unit)
        found = []
        for units in alike.values():
            if len(units) > _APART:
                names = f"{listed(units, _APART)} alike"
                found.append((names, self.failed[units[0]]))
            else:
                found += [(unit, self.failed[unit]) for unit in units]
        return found

    def summary(self) -> str:
        """One line."""
        return (
            f"{self.stage}: {len(self.done)} done, {len(self.skipped)} already there, "
            f"{len(self.failed)} failed, {self.num_bytes / 1e6:.1f} MB in {self.seconds:.1f} s"
        )

    def plan(self) -> str:
        """The same of a dry run."""
        return (
            f"{self.stage}: dry run, nothing is written; {len(self.done)} to do, "
            f"{len(self.skipped)} already there, {len(self.failed)} would fail"
        )

    def to_json(self) -> Mapping[str, Any]:
        """Plain values."""
        return {
            "stage": self.stage,
            "done": self.done,
            "skipped": self.skipped,
            "failed": {unit: str(error) for unit, error in self.failed.items()},
            # Only where there are some: reports without have the keys they always had.
            **({"warnings": self.warnings} if self.warnings else {}),
            "seconds": round(self.seconds, 3),
            "bytes": self.num_bytes,
            "exit_code": self.exit_code,
            **self.details,
        }
