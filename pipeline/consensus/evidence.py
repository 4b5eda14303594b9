"""What stage one measured of each teacher, kept in the index for whoever has neither labels nor
weights at hand: stage two reads temperatures from it.

One sealed JSON per teacher and registry. It holds what was found, no judgement: thresholds may
change without measuring anything again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from pipeline.cache.index import (
    IndexedCase,
    IndexedTeacher,
    read_sealed,
    read_teacher_index,
    write_sealed,
)
from pipeline.config import Config, digest, short
from pipeline.data.registry import Registry
from pipeline.errors import CacheMissing
from pipeline.folder import Folder, matching

# Which units the gate looks at. They are units of the cache that stage one makes anyway: it makes
# them first.


@dataclass(frozen=True)
class GateCases:
    """What one teacher is judged by in one organ.

    Attributes:
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


def plan_gate_cases(registry: Registry, cases: Sequence[IndexedCase]) -> list[GateCases]:
    """Every teacher and organ; a pure function of the registry and the cases.

    Scored are all validation cases that annotate the organ; where there is none at all, a few
    training cases. Test cases decide nothing.
    """
    few = registry.admission.cases
    known = [case for case in cases if case.split in ("train", "validation")]
    gate_cases = []
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
            gate_cases.append(
                GateCases(teacher, organ, split, tuple(scored), tuple(others), tuple(labelled))
            )
    return gate_cases


def units_of(gate_cases: Sequence[GateCases]) -> frozenset[tuple[str, str]]:
    """The units that the gate looks at, as (teacher, `dataset/case`)."""
    return frozenset(
        (one.teacher, case.name) for one in gate_cases for case in (*one.scored, *one.elsewhere)
    )


def by_teacher(gate_cases: Sequence[GateCases]) -> Mapping[str, list[GateCases]]:
    """Teacher -> its gate cases, organ by organ."""
    found: dict[str, list[GateCases]] = {}
    for one in gate_cases:
        found.setdefault(one.teacher, []).append(one)
    return found


def _few_of_each(cases: Sequence[IndexedCase], few: int) -> list[IndexedCase]:
    """Up to `few` of each dataset, drawn by the digests of their images."""
    chosen = []
    for dataset in sorted({case.dataset for case in cases}):
        own = [case for case in cases if case.dataset == dataset]
        chosen += sorted(own, key=lambda case: (case.image_sha256, case.case))[:few]
    return chosen


# How far a teacher's log-odds can be relied on: one temperature per teacher and organ.
#
#     p(v) = sigmoid(d(v) / T)
#     T = argmin of the mean of  -log p(v)        where the label says the organ,
#                                -log(1 - p(v))   where it says not,
#
# over all voxels that the teacher saw and the label knows. T > 1: the teacher is over-confident.
# Source: temperature scaling and the expected calibration error (ECE) of Guo et al. 2017, arXiv
# 1706.04599, for one organ against all else; that far background counts too is a choice, measured
# in docs/decisions.
#
# Cached values are float16, so a histogram with one bin per bit pattern is exact and as small for a
# thousand cases as for one.

Counts = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]

# A few cases on which a teacher makes no mistake would let it be as sure as one likes.
BOUNDS: Final = (0.25, 16.0)
NUM_ECE_BINS: Final = 15
_NUM_PATTERNS: Final = 1 << 16


class Calibration(Config):
    """The best temperature, and what it changes.

    Attributes:
        temperature: T > 0; 1 if the label shows one class only, since then nothing can be known.
        at_bound: whether T is one of `BOUNDS`, so that the best one lies beyond.
        num_voxels: that it was measured on.
        num_inside: of them, those whose label is the organ.
        nll_before: mean negative log-likelihood in nats at T = 1.
        nll_after: at T.
        ece_before: expected calibration error at T = 1, 0 to 1.
        ece_after: at T.
    """

    temperature: float
    at_bound: bool
    num_voxels: int
    num_inside: int
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float


def no_counts() -> Counts:
    """int64 (2, 65536) of zeros: label says not, label says so; one column per float16 pattern."""
    return np.zeros((2, _NUM_PATTERNS), dtype=np.int64)


def count_log_odds(odds: npt.NDArray[np.float16], inside: BoolArray, chosen: BoolArray) -> Counts:
    """How often each value occurs inside and outside the organ.

    Args:
        odds: float16 log-odds (D, H, W), NaN where not seen; such voxels are left out.
        inside: (D, H, W), where the label is the organ.
        chosen: (D, H, W), voxels to count: those that the label knows.

    Returns:
        int64 (2, 65536), as `no_counts`.
    """
    counts = no_counts()
    chosen = chosen & ~np.isnan(odds)
    patterns = np.ascontiguousarray(odds).view(np.uint16)
    for row, where in enumerate((chosen & ~inside, chosen & inside)):
        counts[row] = np.bincount(patterns[where], minlength=_NUM_PATTERNS)
    return counts


def calibrate(counts: Counts) -> Calibration | None:
    """The temperature that best explains the counts; None if nothing was counted.

    The likelihood is convex in 1 / T, so it has one minimum in log T, which a bounded search finds.

    Args:
        counts: int64 (2, 65536) of `count_log_odds`, summed over cases.
    """
    used = np.flatnonzero(counts.sum(axis=0))
    if used.size == 0:
        return None
    values = used.astype(np.uint16).view(np.float16).astype(np.float64)
    outside, inside = counts[:, used].astype(np.float64)
    temperature = _search(values, outside, inside)
    return Calibration(
        temperature=temperature,
        at_bound=temperature in BOUNDS,
        num_voxels=int(outside.sum() + inside.sum()),
        num_inside=int(inside.sum()),
        nll_before=_rounded(_nll(values, outside, inside)),
        nll_after=_rounded(_nll(values / temperature, outside, inside)),
        ece_before=_rounded(_ece(values, outside, inside)),
        ece_after=_rounded(_ece(values / temperature, outside, inside)),
    )


def _search(values: FloatArray, outside: FloatArray, inside: FloatArray) -> float:
    from scipy.optimize import minimize_scalar

    if not (outside.any() and inside.any()):
        return 1.0

    def loss(log_temperature: float) -> float:
        return _nll(values / np.exp(log_temperature), outside, inside)

    low, high = np.log(BOUNDS)
    found = float(minimize_scalar(loss, bounds=(low, high), method="bounded").x)
    # The search never looks at its ends, which is where the minimum is if a teacher never errs.
    best = min((found, low, high), key=loss)
    return _rounded(float(np.exp(best)))


def _nll(values: FloatArray, outside: FloatArray, inside: FloatArray) -> float:
    """Mean of -log sigmoid(+-d), in nats: log(1 + exp(-d)) inside, log(1 + exp(d)) outside."""
    total = inside @ np.logaddexp(0, -values) + outside @ np.logaddexp(0, values)
    return float(total / (inside.sum() + outside.sum()))


def _ece(values: FloatArray, outside: FloatArray, inside: FloatArray) -> float:
    """Mean over voxels of |mean p - share inside| of the voxel's bin; bins of equal width in p."""
    p = np.exp(-np.logaddexp(0, -values))
    bins = np.minimum((p * NUM_ECE_BINS).astype(np.int64), NUM_ECE_BINS - 1)
    count = inside + outside
    gap = np.bincount(bins, weights=p * count - inside, minlength=NUM_ECE_BINS)
    return float(np.abs(gap).sum() / count.sum())


def _rounded(value: float) -> float:
    """Six significant digits: the last ones of a sum differ between machines."""
    return float(f"{value:.6g}")


# Raised when the same units would give other evidence.
_VERSION = 1
_FOLDER = "index/evidence"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


class Score(Config):
    """One labelled case: {log-odds > 0} against the label, on the student grid.

    Attributes:
        case: `dataset/case`.
        dice: 0 where the prediction alone is empty, None where the label is.
        sensitivity: share of the label that was found; None where the label is empty.
        region_ml: size of {log-odds > 0}.
    """

    case: str
    dice: float | None
    sensitivity: float | None
    region_ml: float


class Region(Config):
    """One case without a label of the organ; `region_ml` as in `Score`."""

    case: str
    region_ml: float


class Circumstances(Config):
    """What a case is like: spacing (z, y, x) of its file, 0 across one slice; 1st and 99th
    percentile of its HU."""

    spacing_mm: tuple[float, float, float]
    hu: tuple[float, float]

    @property
    def one_slice(self) -> bool:
        """Whether its file holds one slice."""
        return 0.0 in self.spacing_mm


class OrganEvidence(Config):
    """What was measured of a teacher in one organ.

    Attributes:
        split: of the scored cases; a teacher is over-confident on cases that it was trained on.
        scored: labelled cases.
        elsewhere: cases of datasets that do not annotate the organ.
        label_ml: smallest and largest organ in the labels of training and validation cases.
        calibration: over the scored cases; None if there was nothing to measure it on.
    """

    split: str | None
    scored: tuple[Score, ...]
    elsewhere: tuple[Region, ...]
    label_ml: tuple[float, float] | None
    calibration: Calibration | None


class Evidence(Config):
    """What was measured of a teacher.

    Attributes:
        teacher_digest: that its units are stored under.
        spacing_mm: z, y, x that the network is given its images at; None: whatever they have.
        organs: organ -> what was measured.
        cases: `dataset/case` -> what the case is like.
        unread: cases that it could not be judged by: no unit, or a damaged one.
    """

    teacher: str
    teacher_digest: str
    spacing_mm: tuple[float, float, float] | None
    organs: dict[str, OrganEvidence]
    cases: dict[str, Circumstances]
    unread: tuple[str, ...]

    @property
    def saw_nothing(self) -> bool:
        """Whether there were cases to look at, and none of its units could be read."""
        return bool(self.unread) and not self.cases


def evidence_file(work: Folder, registry: Registry, teacher: IndexedTeacher) -> Folder:
    """Where it is kept: by the teacher's digest and by what the registry says of the datasets,
    so that two registries over one work folder do not take turns."""
    datasets = {dataset: registry.dataset_key(dataset) for dataset in registry.datasets}
    key = digest({"teacher_digest": teacher.digest, "datasets": datasets})
    return work / _FOLDER / f"{teacher.teacher}.{short(key)}.json"


def evidence_files(work: Folder) -> list[Folder]:
    """All that is kept, of whatever teacher and registry."""
    return matching(work / _FOLDER, "[!.]*.json")


def _measured(teacher: IndexedTeacher, gate_cases: Sequence[GateCases]) -> dict[str, Any]:
    """All that the evidence depends on: whoever finds the same need not measure again."""
    return {
        "version": _VERSION,
        "teacher_digest": teacher.digest,
        "organs": {one.organ: one.to_json() for one in gate_cases},
    }


def write_evidence(
    work: Folder,
    registry: Registry,
    teacher: IndexedTeacher,
    gate_cases: Sequence[GateCases],
    evidence: Evidence,
) -> None:
    """Records what was measured of a teacher, and on which cases.

    Raises:
        WorkFolderError: it cannot be written.
    """
    content = {"of": _measured(teacher, gate_cases), "evidence": evidence.model_dump(mode="json")}
    write_sealed(evidence_file(work, registry, teacher), content)


def read_evidence(
    work: Folder,
    registry: Registry,
    teacher: IndexedTeacher,
    *,
    gate_cases: Sequence[GateCases] | None = None,
) -> Evidence:
    """What was measured of a teacher; on exactly these gate cases, if any are given.

    Raises:
        CacheMissing: it is absent, damaged, or of something else.
    """
    path = evidence_file(work, registry, teacher)
    try:
        content = read_sealed(path)
        of = content["of"] if gate_cases is None else _measured(teacher, gate_cases)
        if digest(content["of"]) != digest(of):
            raise ValueError("it was measured on other cases")
        return Evidence.model_validate(content["evidence"])
    except _UNREADABLE as error:
        raise CacheMissing(
            f"what stage one measured of teacher {teacher.teacher} (Dice, temperature) is not in "
            "the cache.",
            where=path,
            fix="Run `pipeline cache-teachers` with this registry: it measures it on the cached "
            "validation cases.",
        ) from error


def unreadable_evidence(work: Folder) -> dict[Folder, str]:
    """Files that are not what was written -> why; stage one measures anew what they said."""
    found = {}
    for path in evidence_files(work):
        try:
            read_sealed(path)
        except _UNREADABLE as error:
            found[path] = f"{type(error).__name__}: {error}"
    return found


def temperatures(
    work: Folder, registry: Registry, teachers: Sequence[str]
) -> dict[tuple[str, str], float | None]:
    """(teacher, organ) -> its temperature; None where no label could tell.

    Raises:
        CacheMissing, CacheStale: stage one has not measured it.
    """
    found: dict[tuple[str, str], float | None] = {}
    for name in teachers:
        teacher = read_teacher_index(work, name, registry.teacher_key(name))
        for organ, evidence in read_evidence(work, registry, teacher).organs.items():
            known = evidence.calibration
            found[name, organ] = None if known is None else known.temperature
    return found
