"""One case as arrays to look at: the CT, and what lies over it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.cache.reader import CachedCase
from pipeline.case_checks import json_beside, predicted_labels, prediction_file
from pipeline.cohort import compute, open_case
from pipeline.data.nifti import read_label
from pipeline.data.registry import Registry
from pipeline.data.resample import resample
from pipeline.errors import PipelineError
from pipeline.figures import BACKGROUND_COLOUR
from pipeline.folder import Folder
from pipeline.html_report.lineage import Lineage
from pipeline.html_report.record import RunRecord
from pipeline.html_report.scores import Student
from pipeline.inspection.looks import View, look_at
from pipeline.inspection.picture import CONFLICT_COLOUR
from pipeline.label_tables import hex_colour
from pipeline.labels import IGNORE, LabelSpace
from pipeline.predicting.case import prediction_digest, student_identity
from pipeline.volume import Volume
from stages.predict import PredictConfig

Array = npt.NDArray[Any]
NOT_OF_THIS_RUN = (
    "Nothing says that this run's student.pt made this label map: it is of another student, of "
    "other settings of predict, was changed since, or the record beside it is gone."
)


@dataclass(frozen=True)
class Layer:
    """What can be laid over the CT.

    Attributes:
        key: short name.
        title: what it is, in words.
        values: uint8 (D, H, W), 0 where there is nothing.
        colours: value -> colour, as `#rrggbb`.
        style: filled, filled so that what lies below is hidden, or outlined.
        shown: whether it is on when the page opens.
    """

    key: str
    title: str
    values: Array
    colours: Mapping[int, str]
    style: Literal["fill", "solid", "outline"]
    shown: bool


@dataclass(frozen=True)
class CaseLayers:
    """A case and its layers.

    Attributes:
        name: `dataset/case`.
        split: train, validation or test.
        annotated: organs that its label speaks of.
        image: int16 HU (D, H, W).
        spacing_mm: z, y, x.
        layers: from the lowest to the uppermost.
        wrong: bool (D, H, W), where student and label differ; all False without a student's map.
        notes: what is missing, and why.
    """

    name: str
    split: str
    annotated: tuple[str, ...]
    image: Array
    spacing_mm: tuple[float, float, float]
    layers: Sequence[Layer]
    wrong: npt.NDArray[np.bool_]
    notes: Sequence[str]


@dataclass(frozen=True)
class CaseSource:
    """Where cases, label maps and teachers' regions come from.

    Attributes:
        work: the work folder.
        registry: for cases that are not the run's own, such as test cases.
        record: of the run.
        lineage: its units.
        student: predicts where there is no prediction; None without weights.
        predictions: folder of label maps; or None.
    """

    work: Folder
    registry: Registry
    record: RunRecord
    lineage: Lineage
    student: Student | None
    predictions: Path | None = None
    _own: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._own.update({case.name: case for case in self.lineage.cases})

    def layers(self, name: str) -> CaseLayers:
        """Everything that can be shown of a case.

        Raises:
            PipelineError: its image is not in the cache.
        """
        case, notes = self._case(name)
        space = self.record.space
        label = case.label()
        annotated = tuple(organ for organ in space.organs if organ in case.annotated)
        colours = organ_colours(space)
        layers = []
        predicted, why = self._label_map(case, notes)
        if predicted is None:
            notes.append(f"No label map of the student: {why}")
        else:
            layers.append(Layer("student", "student", predicted, colours, "fill", True))
        votes, why = self._teachers(case)
        if not votes:
            notes.append(f"No regions of the teachers: {why}")
        layers += votes
        known = np.isin(label, [space.ids[organ] for organ in annotated])
        reference = np.where(known, label, 0).astype(np.uint8)
        title = f"reference ({', '.join(annotated) or 'no organ'})"
        layers.append(Layer("reference", title, reference, colours, "outline", True))
        wrong = np.zeros(label.shape, dtype=np.bool_)
        if predicted is not None:
            judged = np.isin(predicted, [space.ids[organ] for organ in annotated])
            wrong = (np.where(judged, predicted, 0) != reference) & (label != IGNORE)
        return CaseLayers(
            name,
            case.split,
            annotated,
            case.image(),
            case.grid.spacing_mm,
            layers,
            wrong,
            notes,
        )

    def _case(self, name: str) -> tuple[CachedCase, list[str]]:
        """The run's own by digest, others as the registry names them now."""
        own = self._own.get(name)
        if own is not None:
            opened = self.lineage.open(own)
            if opened is None:
                raise PipelineError(
                    f"the case is {own.case.problem}.",
                    where=name,
                    fix="Run `pipeline cache why` to see why, and `pipeline cache-teachers` to "
                    "make it again.",
                )
            return opened, []
        ids = self.record.space.ids
        if any(self.registry.organs.get(organ) != organ_id for organ, organ_id in ids.items()):
            raise PipelineError(
                f"the registry's ids are {dict(self.registry.organs)}, the run's {dict(ids)}.",
                where=name,
                fix="Give the registry that the run was trained with.",
            )
        teachers = [t for t in self.record.teachers if t in self.registry.teachers]
        found = open_case(self.work, self.registry, name, teachers, allow_missing=True)
        other = [
            teacher
            for teacher, unit in found.teachers.items()
            if unit.receipt.inputs["teacher_digest"] != self.record.teachers[teacher]
        ]
        if not other:
            return found, []
        units = {t: unit for t, unit in found.teachers.items() if t not in other}
        experts = {o: [t for t in who if t in units] for o, who in found.experts.items()}
        kept = CachedCase(found.name, found.split, found.annotated, found.case, units, experts)
        return kept, [f"Left out, because the registry now means others: {', '.join(other)}."]

    def _label_map(self, case: CachedCase, notes: list[str]) -> tuple[Array | None, str]:
        if self.predictions is not None:
            try:
                path = prediction_file(self.predictions, case.name)
                found, ids = read_label(path), self.record.space.ids
                labels, _ = predicted_labels(found, ids, (), where=f"{case.name}, {path}")
            except (PipelineError, OSError) as error:
                return None, str(error)
            if not self._is_of_this_run(case, json_beside(path), found.sha256):
                notes.append(NOT_OF_THIS_RUN)
            volume = Volume(labels, found.volume.grid)
            return resample(volume, case.grid, order=0, outside=0).array, ""
        if self.student is None:
            return None, "the run has no readable student.pt or best.pt."
        return self.student.label_map(case), ""

    def _is_of_this_run(self, case: CachedCase, beside: Path, sha256: str) -> bool:
        """Whether `pipeline predict` says that this run's student made it, by default settings."""
        image_sha256 = str(case.case.receipt.inputs.get("image_sha256"))
        try:
            content = json.loads(beside.read_text(encoding="utf-8"))
            settings = PredictConfig().model_dump(mode="json")
            identity = student_identity(self.record.folder / "student.pt", settings)
            expected = prediction_digest(identity, image_sha256)
            known = content.get("files", {}).get(f"{beside.stem}.nii.gz", sha256)
            return bool(content["digest"] == expected and known == sha256)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _teachers(self, case: CachedCase) -> tuple[list[Layer], str]:
        """By the teachers alone: where labels win there is little to see on a labelled case."""
        if not case.teachers:
            uses = bool(self.record.teachers)
            return [], "the cache has none of this case." if uses else "the run used no teacher."
        view = self.record.view
        alone = View(view.margin, False, view.confidence, view.temperatures)
        try:
            look = look_at(case, self.record.space, alone)
            regions, background, conflicts = compute(
                look.region_ids(), look.regions.background.view(np.uint8), look.num_claims()
            )
        except PipelineError as error:
            return [], error.what
        colours = organ_colours(self.record.space)
        # One colour for all counts: two or more organs claim the voxel.
        claims = (conflicts > 0).astype(np.uint8)
        title = "agreed background"
        return [
            Layer("regions", "teachers' organ regions", regions, colours, "fill", False),
            Layer("background", title, background, {1: BACKGROUND_COLOUR}, "fill", False),
            Layer("conflict", "conflict of teachers", claims, {1: CONFLICT_COLOUR}, "solid", True),
        ], ""


def organ_colours(space: LabelSpace) -> dict[int, str]:
    """Organ id -> its colour, the same in all pictures."""
    return {organ_id: hex_colour(organ_id) for organ_id in space.ids.values()}
