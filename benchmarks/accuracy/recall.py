"""What teachers are worth on the student's cases, where only this bench knows the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.accuracy.registries import own_dataset
from pipeline.consensus.cohort import open_cohort
from pipeline.data.registry import load_registry


def measure_teachers(folder: Path) -> dict[str, dict[str, Any]]:
    """Teacher -> what its region {log-odds > 0} is worth on the student's training cases of the
    *other* datasets, over all their voxels: there no label corrects it, and nobody trained it.

    Returns:
        `recall`, `precision`, `dice` (None where nothing is there to divide by), `num_cases`, and
        `missed_cases`, in which it found less than a tenth of an organ that is there.
    """
    registry = load_registry(folder / "student_registry.yaml", files=False)
    truth_registry = load_registry(folder / "full_registry.yaml", files=False)
    work = folder / "work"
    cases = open_cohort(work, registry, teachers=list(registry.teachers), splits=("train",)).cases
    full = open_cohort(work, truth_registry, splits=("train",)).cases
    truth = {case.name: case.label() for case in full}
    found = {}
    for organ in registry.label_space.organs:
        others = [c for c in cases if not c.name.startswith(f"{own_dataset(organ)}/")]
        counts = np.array(
            [
                _counts(c.log_odds(organ, organ) > 0, truth[c.name] == registry.organs[organ])
                for c in others
            ]
        )
        found[organ] = worth(counts) | {"num_cases": len(others)}
    return found


def worth(counts: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Recall, precision and Dice over cases together.

    Args:
        counts: (N, 3) voxels per case: in both, in the region, in the label.
    """
    both, region, label = (int(n) for n in counts.sum(axis=0))
    present = counts[:, 2] > 0
    missed = int((counts[present, 0] < 0.1 * counts[present, 2]).sum())
    return {
        "recall": both / label if label else None,
        "precision": both / region if region else None,
        "dice": 2 * both / (region + label) if region + label else None,
        "missed_cases": missed,
    }


def _counts(region: npt.NDArray[np.bool_], label: npt.NDArray[np.bool_]) -> list[int]:
    return [int((region & label).sum()), int(region.sum()), int(label.sum())]
