"""One case as arrays to look at, the CT and what lies over it; and its slices as few pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor

from pipeline.cache.reader import CachedCase
from pipeline.consensus.cohort import compute, open_case
from pipeline.data.labels import IGNORE, LabelSpace
from pipeline.data.nifti import read_label
from pipeline.data.registry import Registry
from pipeline.data.resample import resample
from pipeline.data.volume import Volume
from pipeline.errors import PipelineError
from pipeline.figures import BACKGROUND_COLOUR, PLANE_ENDS, WINDOW_HU, hex_colour, planes_of_shape
from pipeline.folder import Folder
from pipeline.review.inspect.look import View, look_at
from pipeline.review.inspect.run import CONFLICT_COLOUR
from pipeline.review.predictions import json_beside, predicted_labels, prediction_file
from pipeline.review.report.scores import Student
from pipeline.review.report.trace import Lineage, RunRecord
from pipeline.student.predicted import prediction_digest, student_identity

# Slices of a case as few pictures: per plane one sheet of tiles for the CT, one for each layer. A
# sheet compresses better than single slices, and a page shows the tile that it opens at without
# code. CT sheets are JPEG, layers PNG with a palette and transparency.

Array = npt.NDArray[Any]
# (slices per plane, pixels of the longest side), the first that fits is taken.
SIZE_STEPS = ((48, 240), (36, 240), (24, 208), (16, 176), (8, 144), (4, 112))
IMAGE_BYTES = 11_000_000
_JPEG_QUALITY = 80
_PANEL_SIDE = 360
_ALPHA = {"fill": 115, "solid": 215, "outline": 255}


@dataclass(frozen=True)
class Sheet:
    """One layer of one plane, or one slice with its layers, as a data URI."""

    key: str
    uri: str


@dataclass(frozen=True)
class Plane:
    """One plane of a case.

    Attributes:
        slices: numbers of the slices shown, from 1, of `num_slices` that the case has.
        start: which of `slices` is shown first, from 0.
        sheets: of the layers that show anything, lowest first.
    """

    name: str
    ends: tuple[str, str, str, str]
    slices: tuple[int, ...]
    num_slices: int
    start: int
    columns: int
    rows: int
    width: int
    height: int
    image: str
    sheets: Sequence[Sheet]

    @property
    def num_bytes(self) -> int:
        """Of all its pictures, as they stand in the page."""
        return len(self.image) + sum(len(sheet.uri) for sheet in self.sheets)


def fitting_planes(
    cases: Sequence[CaseLayers], most_bytes: int = IMAGE_BYTES
) -> tuple[list[list[Plane]], tuple[int, int]]:
    """All planes of all cases, with as many slices and pixels as the page has room for, and
    (slices, pixels) that it came to: the last of `SIZE_STEPS` whatever it takes."""
    planes: list[list[Plane]] = []
    for step in SIZE_STEPS:
        planes = [planes_of(case, *step) for case in cases]
        if sum(plane.num_bytes for found in planes for plane in found) <= most_bytes:
            break
    return planes, step


def planes_of(case: CaseLayers, most_slices: int, side: int) -> list[Plane]:
    """Axial, coronal and sagittal, all at one scale, `side` pixels along the case's longest edge;
    of one slice its own plane."""
    edges_mm = [n * mm for n, mm in zip(case.image.shape, case.spacing_mm, strict=True)]
    pixels = [max(1, round(side * mm / max(edges_mm))) for mm in edges_mm]
    grey = _grey(case.image)
    busy = _busy(case)
    planes = []
    for name, axis in planes_of_shape(case.image.shape).items():
        height, width = (n for a, n in enumerate(pixels) if a != axis)
        total = case.image.shape[axis]
        chosen = np.unique(np.linspace(0, total - 1, min(total, most_slices)).round().astype(int))
        areas = busy.sum(axis=tuple(a for a in range(3) if a != axis))[chosen]
        start = int(areas.argmax()) if areas.any() else len(chosen) // 2
        columns = int(np.ceil(np.sqrt(len(chosen))))
        rows = int(np.ceil(len(chosen) / columns))
        shape = (rows, columns, height, width)
        sheets = [
            Sheet(layer.key, _layer_uri(layer, axis, chosen, shape))
            for layer in case.layers
            if layer.values.any()
        ]
        slices = tuple(int(i) + 1 for i in chosen)
        image = _image_uri(grey, axis, chosen, shape)
        planes.append(
            Plane(
                name, PLANE_ENDS[name], slices, total, start, columns, rows, width, height, image,
                sheets,
            )
        )  # fmt: skip
    return planes


def side_by_side(case: CaseLayers, titles: Mapping[str, Sequence[str]]) -> tuple[str, list[Sheet]]:
    """One slice several times, axial where student and reference differ most, and which, in words.

    Args:
        titles: panel -> keys of the layers that are laid over the CT. A panel none of whose layers
            the case has is left out.
    """
    name, axis = next(iter(planes_of_shape(case.image.shape).items()))
    across = tuple(a for a in range(3) if a != axis)
    areas = _busy(case).sum(axis=across)
    index = int(areas.argmax()) if areas.any() else len(areas) // 2
    edges_mm = [case.image.shape[a] * case.spacing_mm[a] for a in across]
    size = [max(1, round(_PANEL_SIDE * mm / max(edges_mm))) for mm in edges_mm]
    grey = _scaled(_tile(_grey(case.image), axis, index), size, Image.Resampling.BILINEAR)
    panels = []
    for title, keys in titles.items():
        layers = [layer for layer in case.layers if layer.key in keys]
        if layers or not keys:
            drawn = np.repeat(grey[..., None], 3, axis=-1)
            for layer in layers:
                values = _scaled(_tile(layer.values, axis, index), size, Image.Resampling.NEAREST)
                for value, colour in layer.colours.items():
                    inside = values == value
                    drawn[inside] = drawn[inside] // 2 + np.array(ImageColor.getrgb(colour)) // 2
            picture = Image.fromarray(drawn)
            panels.append(Sheet(title, data_uri(picture, "jpeg", quality=85, subsampling=0)))
    return f"{name} slice {index + 1} of {len(areas)}", panels


def _grey(image_hu: Array) -> Array:
    low, high = WINDOW_HU
    grey = np.clip((image_hu.astype(np.float32) - low) / (high - low) * 255, 0, 255)
    return np.rint(grey).astype(np.uint8)


def _busy(case: CaseLayers) -> npt.NDArray[np.bool_]:
    """What a plane opens at: the most errors of the student, else the most of any organ."""
    if case.wrong.any():
        return case.wrong
    found = np.zeros(case.image.shape, dtype=np.bool_)
    for layer in case.layers:
        if layer.key != "background":
            found |= layer.values > 0
    return found


def _tile(volume: Array, axis: int, index: int) -> Array:
    """As radiologists look: right on the left, anterior or superior at the top."""
    return np.asarray(np.take(volume, index, axis=axis)[::-1, ::-1])


def _image_uri(grey: Array, axis: int, chosen: Array, shape: tuple[int, ...]) -> str:
    tiles = [_scaled(_tile(grey, axis, i), shape[2:], Image.Resampling.BILINEAR) for i in chosen]
    return data_uri(Image.fromarray(_montage(tiles, shape)), "jpeg", quality=_JPEG_QUALITY)


def _layer_uri(layer: Layer, axis: int, chosen: Array, shape: tuple[int, ...]) -> str:
    numbers = np.zeros(256, dtype=np.uint8)
    for number, value in enumerate(layer.colours, start=1):
        numbers[value] = number
    tiles = []
    for index in chosen:
        values = numbers[_tile(layer.values, axis, index)]
        tile = _scaled(values, shape[2:], Image.Resampling.NEAREST)
        tiles.append(_outline(tile) if layer.style == "outline" else tile)
    sheet = Image.fromarray(_montage(tiles, shape), mode="P")
    colours = [ImageColor.getrgb(colour)[:3] for colour in layer.colours.values()]
    sheet.putpalette([0, 0, 0, *(part for colour in colours for part in colour)])
    transparency = bytes([0] + [_ALPHA[layer.style]] * len(layer.colours))
    return data_uri(sheet, "png", optimize=True, transparency=transparency)


def _scaled(tile: Array, size: Sequence[int], how: Image.Resampling) -> Array:
    height, width = size
    return np.asarray(Image.fromarray(np.ascontiguousarray(tile)).resize((width, height), how))


def _montage(tiles: Sequence[Array], shape: tuple[int, ...]) -> Array:
    rows, columns, height, width = shape
    sheet = np.zeros((rows * height, columns * width), dtype=np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // columns * height, number % columns * width
        sheet[top : top + height, left : left + width] = tile
    return sheet


def _outline(tile: Array) -> Array:
    """The pixels of each value that have a neighbour of another one; beyond the tile is 0."""
    padded = np.pad(tile, 1)
    inner = np.ones(tile.shape, dtype=np.bool_)
    for rows, columns in ((0, 1), (2, 1), (1, 0), (1, 2)):
        height, width = tile.shape
        inner &= padded[rows : rows + height, columns : columns + width] == tile
    return np.where(inner, 0, tile).astype(np.uint8)


def data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    """A picture as a page holds it; options are Pillow's."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


NOT_OF_THIS_RUN = (
    "Nothing says that this run's student.pt made this label map: it is of another student, of "
    "other settings of predict, was changed since, or the record beside it is gone."
)


@dataclass(frozen=True)
class Layer:
    """What can be laid over the CT.

    Attributes:
        values: uint8 (D, H, W), 0 where there is nothing.
        colours: value -> colour, as `#rrggbb`.
        style: `solid` is filled so that what lies below is hidden.
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
        image: int16 HU (D, H, W).
        spacing_mm: z, y, x.
        layers: from the lowest to the uppermost.
        wrong: bool (D, H, W), where student and label differ; all False without a student's map.
    """

    name: str
    split: str
    image: Array
    spacing_mm: tuple[float, float, float]
    layers: Sequence[Layer]
    wrong: npt.NDArray[np.bool_]
    notes: Sequence[str]


@dataclass(frozen=True)
class CaseSource:
    """Where cases, label maps and teachers' regions come from.

    Attributes:
        registry: for cases that are not the run's own, such as test cases.
        student: predicts where there is no prediction; None without weights.
        settings: of `pipeline predict`, by which predictions are known as the run's own.
    """

    work: Folder
    registry: Registry
    record: RunRecord
    lineage: Lineage
    student: Student | None
    settings: Mapping[str, Any]
    predictions: Path | None = None

    def layers(self, name: str) -> CaseLayers:
        """Everything that can be shown of a case."""
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
        ids = [space.ids[organ] for organ in annotated]
        title = f"reference ({', '.join(annotated) or 'no organ'})"
        layers.append(Layer("reference", title, among(label, ids), colours, "outline", True))
        wrong = np.zeros(label.shape, dtype=np.bool_)
        if predicted is not None:
            wrong = differing(predicted, label, ids)
        spacing_mm = case.grid.spacing_mm
        return CaseLayers(name, case.split, case.image(), spacing_mm, layers, wrong, notes)

    def _case(self, name: str) -> tuple[CachedCase, list[str]]:
        """The run's own by digest, others as the registry names them now."""
        own = next((case for case in self.lineage.cases if case.name == name), None)
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
            identity = student_identity(self.record.folder / "student.pt", self.settings)
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


def among(values: Array, ids: Sequence[int]) -> npt.NDArray[np.uint8]:
    """The ids that are asked for; all else is 0."""
    return np.where(np.isin(values, ids), values, 0).astype(np.uint8)


def differing(predicted: Array, label: Array, ids: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Where a label map and a label differ, in the ids that the label annotates."""
    return np.asarray((among(predicted, ids) != among(label, ids)) & (label != IGNORE))


def organ_colours(space: LabelSpace) -> dict[int, str]:
    """Organ id -> its colour, the same in all pictures."""
    return {organ_id: hex_colour(organ_id) for organ_id in space.ids.values()}
