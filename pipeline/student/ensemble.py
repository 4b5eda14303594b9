"""Several students, and mirror images, as one student: their logits are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from torch import Tensor, nn

from pipeline.errors import ConfigError, listed
from pipeline.folder import Folder
from pipeline.student.augment import sided_organs
from pipeline.student.checkpoint import StudentRecord
from pipeline.student.inference import first_output

# What students must have in common to be averaged window by window, and what it is called.
_IN_COMMON = {
    "organs": "organs", "spacing_mm": "spacing in mm", "head": "head", "intensity": "intensity",
    "patch": "patch",
}  # fmt: skip


def averaged(
    students: Mapping[Folder, tuple[StudentRecord, nn.Module]], *, mirror: bool
) -> tuple[StudentRecord, nn.Module]:
    """One student out of several, whose logits are the mean of theirs.

    It was trained on the cases of all, and removes parts of organs by the rules that all learnt.

    Args:
        students: by their files.
        mirror: also over mirror images along the axes that were mirrored in training.

    Raises:
        ConfigError: they differ in what they must have in common, were not trained mirrored, or
            organs have a side along such an axis.
    """
    (first, (record, network)), *others = students.items()
    for path, (other, _) in others:
        for name, word in _IN_COMMON.items():
            if getattr(other, name) != getattr(record, name):
                raise ConfigError(
                    f"it differs from {first} in {word}: {getattr(other, name)}, not "
                    f"{getattr(record, name)}.",
                    where=path,
                    fix="Average students of one registry and one set of settings: seeds or folds.",
                )
    axes = _mirror_axes({path: one for path, (one, _) in students.items()}) if mirror else ()
    if not others and not axes:
        return record, network
    records = [one for one, _ in students.values()]
    trained_on = tuple(sorted({case for one in records for case in one.trained_on}))
    rules = {
        organ: rule
        for organ, rule in record.postprocessing.items()
        if all(one.postprocessing.get(organ) == rule for one in records)
    }
    common = record.model_copy(update={"trained_on": trained_on, "postprocessing": rules})
    return common, MeanLogits([one for _, one in students.values()], axes).eval()


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


class MeanLogits(nn.Module):
    """(N, 1, ..) -> (N, C, ..): the mean of the logits of several networks, each on the window and
    all its mirror images; before the windows are blended, so that no more of a volume is held.

    Logits are averaged, not probabilities, as nnU-Net does with mirror images (Isensee et al. 2021,
    Nature Methods 18): the softmax of the mean is the normalised geometric mean of the softmaxes.

    Args:
        networks: one or more.
        axes: 0 z, 1 y, 2 x; mirror images along all combinations of them.
    """

    def __init__(self, networks: Sequence[nn.Module], axes: Sequence[int]) -> None:
        super().__init__()
        self._networks = nn.ModuleList(networks)
        dims = [axis - 3 for axis in axes]
        self._flips = [f for n in range(len(dims) + 1) for f in combinations(dims, n)]

    def forward(self, window: Tensor) -> Tensor:
        """See the class."""
        total: Tensor | None = None
        for network in self._networks:
            for flip in self._flips:
                out = first_output(network(window.flip(flip) if flip else window)).float()
                out = out.flip(flip) if flip else out
                total = out if total is None else total + out
        assert total is not None
        return total / (len(self._networks) * len(self._flips))
