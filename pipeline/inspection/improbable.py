"""Which cases are improbable, and why, in words: pure functions of their numbers.

Nobody can say that a region is wrong where no label speaks of it: an organ may be cut off, removed
or ill. So a flag says what is odd and asks for a look; it stops nothing. The limits are coarse on
purpose: a warning that comes often is not heard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from pipeline.admission.verdict import is_odd_volume
from pipeline.inspection.measure import CaseNumbers, OrganNumbers
from pipeline.reliability import MOST_PARTS, QUANTILES
from pipeline.tables import in_ml

# The share of a labelled organ that teachers may miss, and that their agreed background may hold.
MOST_MISSED: Final = 0.5
MOST_SWALLOWED: Final = 1 / 3


@dataclass(frozen=True)
class Usual:
    """What an organ's labels in training and validation cases look like.

    Attributes:
        label_ml: 5 % and 95 % quantile of its size, empty labels left out; None without a label.
        components: most large components of any label.
        num_cases: labels that say so.
    """

    label_ml: tuple[float, float] | None
    components: int
    num_cases: int


def usual_of(cases: Sequence[CaseNumbers]) -> Mapping[str, Usual]:
    """Organ -> what its labels look like; test cases are not looked at."""
    found = {}
    known = [case for case in cases if case.split in ("train", "validation")]
    for organ in dict.fromkeys(name for case in cases for name in case.organs):
        seen = [case.organs[organ] for case in known if organ in case.organs]
        labelled = [numbers for numbers in seen if numbers.label_ml]
        sizes = [numbers.label_ml or 0.0 for numbers in labelled]
        ends = None
        if sizes:
            low, high = np.quantile(sizes, QUANTILES)
            ends = (round(float(low), 3), round(float(high), 3))
        most = max((n.label_components or 0 for n in labelled), default=MOST_PARTS)
        found[organ] = Usual(ends, most, len(sizes))
    return found


def flagged(case: CaseNumbers, usual: Mapping[str, Usual]) -> CaseNumbers:
    """The same numbers with the reasons why they are improbable.

    Args:
        case: its numbers.
        usual: of the cohort; an organ that is absent is judged by the case alone.
    """
    flags: list[str] = []
    for organ, numbers in case.organs.items():
        flags += _own_label(organ, numbers) + _region(organ, numbers, usual.get(organ))
    return case.model_copy(update={"flags": tuple(flags)})


def _own_label(organ: str, numbers: OrganNumbers) -> list[str]:
    if not numbers.label_ml or numbers.missed_ml is None or numbers.swallowed_ml is None:
        return []
    missed, swallowed = (ml / numbers.label_ml for ml in (numbers.missed_ml, numbers.swallowed_ml))
    reasons = []
    if missed > MOST_MISSED:
        reasons.append(f"teachers miss {missed:.0%} of the labelled organ")
    if swallowed > MOST_SWALLOWED:
        reasons.append(f"agreed background of the teachers holds {swallowed:.0%} of the label")
    return [f"{organ}: {', '.join(reasons)}"] if reasons else []


def _region(organ: str, numbers: OrganNumbers, usual: Usual | None) -> list[str]:
    """An empty label is right about an empty region."""
    if not numbers.region_ml:
        empty = numbers.label_ml is None
        return [f"{organ}: the region is empty, and no label speaks of it"] if empty else []
    reasons = []
    if usual is not None and usual.label_ml and is_odd_volume(numbers.region_ml, usual.label_ml):
        low, high = usual.label_ml
        reasons.append(
            f"{organ}: {in_ml(numbers.region_ml)} ml, while {usual.num_cases} "
            f"label{'s' if usual.num_cases > 1 else ''} show {in_ml(low)} to {in_ml(high)} ml"
        )
    most = MOST_PARTS if usual is None else usual.components
    if numbers.components > most:
        where = "than any label has" if usual is not None and usual.num_cases else "than expected"
        reasons.append(f"{organ}: {numbers.components} large separate parts, more {where} ({most})")
    return reasons
