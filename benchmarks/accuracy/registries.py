"""The data of one job as phantoms and registries: pure functions of regime, size and seed.

Every CT is written once, with all organs labelled. What an entry of a registry annotates is what
its user may know: the other label values are declared background there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.accuracy.regimes import Regime, drawn_seed
from benchmarks.accuracy.size import Size
from pipeline.data.entries import ORGANS, PhantomSpec

MULTI = "multi-ct"


def own_dataset(organ: str) -> str:
    """The student's dataset that annotates an organ alone."""
    return f"{organ}-ct"


def outside_dataset(organ: str) -> str:
    """The data that an organ's teacher was trained on elsewhere."""
    return f"{organ}-outside"


def phantoms(regime: Regime, size: Size, seed: int) -> dict[str, PhantomSpec]:
    """Folder below `phantom/` -> what is in it, all organs labelled."""

    def spec(name: str, num_cases: int, shift: float, phase: int | None = None) -> PhantomSpec:
        drawn = drawn_seed(regime, seed, name)
        if phase is not None:  # a shifted dataset prefers phase `seed % 3`
            drawn += (phase - drawn) % 3
        return PhantomSpec(
            num_cases=num_cases, seed=drawn, annotated=ORGANS, shift=shift, shape=size.shape
        )

    own = _train_cases(regime, size) + size.validation_cases + size.test_cases
    found = {own_dataset(organ): spec(own_dataset(organ), own, regime.shift) for organ in ORGANS}
    multi = size.multi_validation_cases + size.multi_test_cases
    found[MULTI] = spec(MULTI, multi, regime.shift)
    if regime.outside_cases:
        for organ in ORGANS:
            cases, shift, phase = regime.outside_cases, 0.0, None
            if regime.weak is not None and organ == regime.weak.organ:
                cases, shift, phase = regime.weak.cases, regime.weak.shift, regime.weak.phase
            name = outside_dataset(organ)
            found[name] = spec(name, min(cases, size.most_cases), shift, phase)
    return found


def registries(regime: Regime, size: Size) -> dict[str, dict[str, Any]]:
    """Name -> content of the registries of a job.

    `student`: labels of one organ per dataset, teachers, validation cases. `full`: the student's
    training CTs with all organs annotated. `test`: cases that nobody trains or chooses by, fully
    labelled. `outside`, if teachers are trained there: their data.
    """
    train = _train_cases(regime, size)
    ends = (train, train + size.validation_cases)
    last = ends[1] + size.test_cases
    multi = (size.multi_validation_cases, size.multi_validation_cases + size.multi_test_cases)
    student, full, test = {}, {}, {}
    for organ in ORGANS:
        name = own_dataset(organ)
        student[name] = _dataset(name, [organ], range(train), range(*ends), range(0))
        full[name] = _dataset(name, ORGANS, range(train), range(0), range(0))
        test[name] = _dataset(name, ORGANS, range(0), range(0), range(ends[1], last))
    student[MULTI] = _dataset(MULTI, ORGANS, range(0), range(multi[0]), range(0))
    test[MULTI] = _dataset(MULTI, ORGANS, range(0), range(0), range(*multi))
    trained_on = None if regime.outside_cases else own_dataset
    taught = {organ: _teacher(organ, trained_on, size) for organ in ORGANS}
    found = {
        "student": _registry(size, student, taught),
        "full": _registry(size, full, {}),
        "test": _registry(size, test, {}),
    }
    if regime.outside_cases:
        outside = {}
        for organ in ORGANS:
            weak = regime.weak is not None and regime.weak.organ == organ
            cases = regime.weak.cases if regime.weak and weak else regime.outside_cases
            name, num = outside_dataset(organ), min(cases, size.most_cases)
            outside[name] = _dataset(name, [organ], range(num), range(0), range(0))
        abroad = {organ: _teacher(organ, outside_dataset, size) for organ in ORGANS}
        found["outside"] = _registry(size, outside, abroad)
    return found


def _train_cases(regime: Regime, size: Size) -> int:
    return min(regime.train_cases, size.most_cases)


def _registry(
    size: Size, datasets: Mapping[str, Any], teachers: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "organs": {organ: k + 1 for k, organ in enumerate(ORGANS)},
        "grid": {"spacing_mm": [size.spacing_mm] * 3},
        "datasets": dict(datasets),
        "teachers": dict(teachers),
        # A bad teacher is what one regime is about; the gate would stop there.
        "admission": {"dice": 0.0},
    }


def _dataset(
    name: str, annotated: Sequence[str], train: range, validation: range, test: range
) -> dict[str, Any]:
    parts = zip(("train", "validation", "test"), (train, validation, test), strict=True)
    return {
        "root": f"phantom/{name}",
        "images": "images/{case}.nii.gz",
        "labels": "labels/{case}.nii.gz",
        "annotated": {o: k + 1 for k, o in enumerate(ORGANS) if o in annotated},
        "background_values": [k + 1 for k, o in enumerate(ORGANS) if o not in annotated],
        "split": {split: [f"case_{i:03d}" for i in cases] for split, cases in parts},
    }


def _teacher(organ: str, trained_on: Any, size: Size) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "kind": "checkpoint",
        "weights": f"teachers/{organ}.pt",
        "organs": {organ: 1},
        "num_channels": 2,
        "spacing_mm": [size.spacing_mm] * 3,
        "taps": [size.tap],
    }
    return entry if trained_on is None else {**entry, "trained_on": trained_on(organ)}
