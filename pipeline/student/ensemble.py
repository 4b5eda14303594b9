"""Several students, and mirror images, as one student: their logits are averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, listed
from pipeline.folder import Folder
from pipeline.student.augment import sided_organs
from pipeline.student.checkpoint import StudentRecord

if TYPE_CHECKING:
    from torch import nn

# What students must have in common to be averaged window by window, and what it is called.
_IN_COMMON = {
    "organs": "organs", "spacing_mm": "spacing in mm", "head": "head", "intensity": "intensity",
    "patch": "patch",
}  # fmt: skip


def common_record(
    records: Mapping[Folder, StudentRecord], *, mirror: bool
) -> tuple[StudentRecord, tuple[int, ...]]:
    """What is known of students that are averaged, and the axes of mirror images.

    They were trained on the cases of all, and remove parts of organs by the rules that all learnt.

    Args:
        records: of the students, by their files.
        mirror: also over mirror images along the axes that were mirrored in training.

    Raises:
        ConfigError: they differ in what they must have in common, were not trained mirrored, or
            organs have a side along such an axis.
    """
    (first, record), *others = records.items()
    for path, other in others:
        for name, word in _IN_COMMON.items():
            if getattr(other, name) != getattr(record, name):
                raise ConfigError(
                    f"it differs from {first} in {word}: {getattr(other, name)}, not "
                    f"{getattr(record, name)}.",
                    where=path,
                    fix="Average students of one registry and one set of settings: seeds or folds.",
                )
    axes = _mirror_axes(records) if mirror else ()
    if not others:
        return record, axes
    trained_on = tuple(sorted({case for one in records.values() for case in one.trained_on}))
    rules = {
        organ: rule
        for organ, rule in record.postprocessing.items()
        if all(one.postprocessing.get(organ) == rule for one in records.values())
    }
    return record.model_copy(update={"trained_on": trained_on, "postprocessing": rules}), axes


def averaged(
    students: Mapping[Folder, tuple[StudentRecord, nn.Module]], *, mirror: bool
) -> tuple[StudentRecord, nn.Module]:
    """One student out of several, whose logits are the mean of theirs; see `common_record`."""
    from pipeline.student.inference import MeanLogits

    records = {path: record for path, (record, _) in students.items()}
    networks = [network for _, network in students.values()]
    record, axes = common_record(records, mirror=mirror)
    if len(networks) == 1 and not axes:
        return record, networks[0]
    return record, MeanLogits(networks, axes).eval()


def _mirror_axes(records: Mapping[Folder, StudentRecord]) -> tuple[int, ...]:
    """Along which all students were mirrored in training."""
    path, record = next(iter(records.items()))
    for other, one in records.items():
        if not one.mirrored:
            raise ConfigError(
                "this student was not trained with mirrored patches, or does not say so.",
                where=other,
                fix="Leave out --mirror (`mirror` in the settings), or train with `flip_axes`.",
            )
    axes = tuple(sorted(set.intersection(*(set(one.mirrored) for one in records.values()))))
    if not axes:
        raise ConfigError(
            "the students were mirrored along different axes in training.",
            where=path,
            fix="Leave out --mirror (`mirror` in the settings), or predict with one of them.",
        )
    sided = sided_organs(record.label_space)
    if 2 in axes and sided:
        raise ConfigError(
            f"a mirrored patient has left for right, which the student tells apart: "
            f"{listed(sided)}.",
            where=path,
            fix="Leave out --mirror (`mirror` in the settings).",
        )
    return axes
