"""The situations that supervisions are compared in: plain numbers, nothing is computed here."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class WeakTeacher:
    """One teacher that was trained on other data than the others.

    Attributes:
        organ: that it is expert in.
        cases: outside cases it was trained on.
        shift: of these cases, see `PhantomSpec.shift`.
        phase: contrast phase that they prefer: 0 native, 1 arterial, 2 portal.
    """

    organ: str
    cases: int
    shift: float
    phase: int


@dataclass(frozen=True)
class Regime:
    """One situation.

    Attributes:
        key: a letter, and the name of its folder.
        title: in tables and pictures.
        train_cases: of each single-organ dataset, that the student has the labels of.
        shift: of every dataset, each with its own seed.
        outside_cases: per organ, that teachers were trained on and the student never sees; 0:
            teachers were trained on the student's own training cases.
        weak: a teacher with other outside data; None: all are alike.
        wider: channels of a teacher's network over those of the student's.
    """

    key: str
    title: str
    train_cases: int
    shift: float = 0.0
    outside_cases: int = 0
    weak: WeakTeacher | None = None
    wider: int = 1

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


_WEAK = WeakTeacher("spleen", cases=1, shift=1.0, phase=0)
REGIMES = {
    regime.key: regime
    for regime in (
        Regime("a", "teachers from more, outside data", train_cases=6, outside_cases=30),
        Regime("b", "teachers from the same data", train_cases=10),
        Regime("c", "datasets shifted apart", train_cases=10, shift=0.5),
        Regime("d", "few labels", train_cases=3),
        Regime("e", "one bad teacher", train_cases=6, outside_cases=30, weak=_WEAK),
        Regime("f", "teachers four times as wide", train_cases=6, outside_cases=30, wider=4),
    )
}


def drawn_seed(regime: Regime, seed: int, what: str) -> int:
    """A seed for one thing in one job: 32 bits, another for every regime, seed and thing."""
    text = f"organ-distill accuracy/{regime.key}/{seed}/{what}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
