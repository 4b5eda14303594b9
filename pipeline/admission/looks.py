"""Which units the gate looks at. They are units of the cache that stage one makes anyway: it makes
them first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.cache.index import IndexedCase
from pipeline.config import digest
from pipeline.data.registry import Registry


@dataclass(frozen=True)
class Look:
    """What one teacher is judged by in one organ.

    Attributes:
        teacher: its name.
        organ: that it is expert in.
        split: of the scored cases; None if there is none.
        scored: labelled cases to score it on, of all datasets that annotate the organ.
        elsewhere: a few cases of each dataset that does not annotate the organ.
        labelled: all training and validation cases with a label of the organ: how large is it?
    """

    teacher: str
    organ: str
    split: Literal["validation", "train"] | None
    scored: tuple[IndexedCase, ...]
    elsewhere: tuple[IndexedCase, ...]
    labelled: tuple[IndexedCase, ...]

    def to_json(self) -> dict[str, Any]:
        """All that its outcome depends on, besides the teacher's own digest."""
        return {
            "split": self.split,
            "scored": {case.name: case.digest for case in self.scored},
            "elsewhere": {case.name: case.digest for case in self.elsewhere},
            "labelled": digest({case.name: case.digest for case in self.labelled}),
        }


def plan_looks(registry: Registry, cases: Sequence[IndexedCase]) -> list[Look]:
    """Every teacher and organ; a pure function of the registry and the cases.

    Scored are all validation cases that annotate the organ; where there is none at all, a few
    training cases. Test cases decide nothing.

    Args:
        registry: who is expert in what, who annotates what.
        cases: that stage one caches.
    """
    few = registry.admission.cases
    known = [case for case in cases if case.split in ("train", "validation")]
    looks = []
    for teacher, entry in registry.teachers.items():
        for organ in entry.organs:
            own = {d for d, dataset in registry.datasets.items() if organ in dataset.annotated}
            labelled = [case for case in known if case.dataset in own]
            scored = [case for case in labelled if case.split == "validation"]
            split: Literal["validation", "train"] | None = "validation"
            if not scored:
                scored = _few_of_each(labelled, few)
                split = "train" if scored else None
            others = _few_of_each([case for case in known if case.dataset not in own], few)
            looks.append(Look(teacher, organ, split, tuple(scored), tuple(others), tuple(labelled)))
    return looks


def units_of(looks: Sequence[Look]) -> frozenset[tuple[str, str]]:
    """The units that the gate looks at, as (teacher, `dataset/case`)."""
    return frozenset(
        (look.teacher, case.name) for look in looks for case in (*look.scored, *look.elsewhere)
    )


def by_teacher(looks: Sequence[Look]) -> Mapping[str, list[Look]]:
    """Teacher -> its looks, one per organ."""
    found: dict[str, list[Look]] = {}
    for look in looks:
        found.setdefault(look.teacher, []).append(look)
    return found


def _few_of_each(cases: Sequence[IndexedCase], few: int) -> list[IndexedCase]:
    """Up to `few` of each dataset, drawn by the digests of their images."""
    chosen = []
    for dataset in sorted({case.dataset for case in cases}):
        own = [case for case in cases if case.dataset == dataset]
        chosen += sorted(own, key=lambda case: (case.image_sha256, case.case))[:few]
    return chosen
