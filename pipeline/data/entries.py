"""What a registry says of one dataset, one phantom, one teacher. Data only: nothing is loaded or
drawn when it is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)

from pipeline.config import Config
from pipeline.data.files import MANY, FoundPair, find_pairs, is_absent
from pipeline.data.labels import Intensity
from pipeline.data.splits import SplitEntry, in_words
from pipeline.data.volume import Orientation
from pipeline.errors import listed


class Pair(Config):
    """One case by its files, relative to the dataset's root."""

    image: str = Field(min_length=1, description="the CT")
    label: str = Field(min_length=1, description="its label map")


@dataclass(frozen=True)
class CaseFiles:
    """A case of a dataset: where its image and label are, its split and, if any, its fold."""

    dataset: str
    case: str
    image: Path
    label: Path
    split: str
    fold: int | None = None

    @property
    def name(self) -> str:
        """`dataset/case`, as messages name it."""
        return f"{self.dataset}/{self.case}"

    @property
    def place(self) -> str:
        """Its fold, as `fold 2`, or its split."""
        return self.split if self.fold is None else in_words(self.fold)


# What determines a dataset of synthetic cases. Data only: a registry is read without what draws.

ORGANS: Final = ("liver", "spleen", "kidneys", "pancreas")


class PhantomSpec(BaseModel):
    """All that determines a dataset of synthetic cases."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_cases: int = Field(ge=1, le=100_000, description="How many cases the dataset has.")
    seed: int = Field(ge=0, description="Source of everything drawn; another seed, other cases.")
    annotated: tuple[str, ...] = Field(
        min_length=1,
        description="Organs that the label files hold, of liver, spleen, kidneys, pancreas. One "
        "organ is written as 1; several are written with the values 1 to 4 of that order.",
    )
    shift: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="How far this dataset lies from the common distribution: noise, contrast "
        "phases, Hounsfield offset, sharpness, field of view, body habitus, slice spacing.",
    )
    shape: tuple[int, int, int] = Field(
        default=(48, 56, 64),
        description="Nominal size (D, H, W) of a case in voxels, over about 288 x 336 x 384 mm; "
        "each case's own size lies around it.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        unknown = sorted(set(self.annotated) - set(ORGANS))
        if unknown or len(set(self.annotated)) != len(self.annotated):
            raise ValueError(f"annotated must be distinct organs of {ORGANS}, not {self.annotated}")
        if min(self.shape) < 16:
            raise ValueError(f"shape must be at least 16 voxels a side, not {self.shape}")
        return self


def case_names(spec: PhantomSpec) -> tuple[str, ...]:
    """The names of a dataset's cases, in order of their index: `case_000`, `case_001`, ..."""
    return tuple(f"case_{i:03d}" for i in range(spec.num_cases))


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


_Positive = Annotated[float, Field(gt=0)]
_Number = Annotated[int, Field(ge=0)]
OneOrMore = Annotated[
    tuple[_Number, ...],
    BeforeValidator(_as_tuple, json_schema_input_type=_Number | tuple[_Number, ...]),
    Field(min_length=1),
]


class AdmissionEntry(Config):
    """What is asked of every teacher before the bulk of stage one is spent on it.

    It decides what is done, never how: no value here is in a digest or in a registry key.
    """

    dice: float = Field(
        default=0.5, ge=0, le=1,
        description="mean Dice on labelled cases, per organ and dataset, below which "
        "cache-teachers stops",
    )  # fmt: skip
    cases: int = Field(
        default=3, ge=1,
        description="cases looked at of each dataset without a label of the organ, and training "
        "cases scored where an organ has no validation case",
    )  # fmt: skip


class TeacherAdmission(Config):
    """What is asked of one teacher instead."""

    dice: float | None = Field(default=None, ge=0, le=1, description="instead of `admission.dice`")


# Left out of keys where absent, so that a new kind leaves the keys of older entries alone.
_OPTIONS_OF_KINDS = ("nnunet", "orientation")

Fold = Literal["all"] | Annotated[int, Field(ge=0)]


def _is_direction(value: str) -> str:
    Orientation.from_code(value)
    return value


def _is_orientation(value: str) -> str:
    return value if value == "stored" else _is_direction(value)


class NnunetOptions(Config):
    """How a trained nnU-Net model folder is used; all of it changes numbers."""

    folds: tuple[Fold, ...] | None = Field(
        default=None, min_length=1, description="averaged; left out: all that have the checkpoint"
    )
    checkpoint: str = Field(
        default="checkpoint_final.pth", pattern=r"^[\w.-]+\.pth$", description="in each `fold_X`"
    )
    mirroring: bool = Field(default=True, description="as the trainer allows, as nnU-Net does")
    tile_step: float = Field(default=0.5, gt=0, le=1, description="step between windows")
    orientation: Annotated[str, AfterValidator(_is_orientation)] | None = Field(
        default=None,
        description="`stored`: axes as in each file; or letters such as LPS; left out: what the "
        "model's own image reader does",
    )


class TeacherEntry(Config):
    """One pre-trained network and the organs that it is expert in."""

    kind: Literal["checkpoint", "student", "exported", "monai-bundle", "nnunet", "factory"] = Field(
        description="`checkpoint`: made by `pipeline train-teachers`; `student`: a student.pt, "
        "whose channels from 1 on are its organs by id; `exported`: a TorchScript or "
        "torch.export file; `monai-bundle`: a bundle's folder; `nnunet`: a trained nnU-Net v2 "
        "model folder; `factory`: your own code"
    )
    weights: str = Field(min_length=1, description="path, relative to the registry's folder")
    organs: dict[str, OneOrMore] = Field(
        min_length=1, description="organ -> output channel, or list of channels, that mean it"
    )
    num_channels: int | None = Field(
        default=None, ge=1, description="output channels; checked here and against the network"
    )
    activation: Literal["softmax", "sigmoid"] = Field(
        default="softmax", description="what the network was trained with"
    )
    outputs: Literal["logits", "probabilities"] = Field(
        default="logits",
        description="what the network's forward gives; probabilities, of a network that ends in "
        "its activation, are turned into logits window by window",
        # Out of keys and digests: units of before this field stay.
        exclude_if=lambda value: value == "logits",
    )
    spacing_mm: tuple[_Positive, _Positive, _Positive] | None = Field(
        default=None,
        description="z, y, x; what the network was trained at. Left out: the student grid for a "
        "checkpoint, the image's own grid for a factory",
    )
    orientation: Annotated[str, AfterValidator(_is_direction)] | None = Field(
        default=None,
        description="where the axes of the array that the network sees point to, first axis first, "
        "as MONAI's `axcodes`; for kind exported",
    )
    intensity: Intensity = Field(default_factory=Intensity)
    taps: tuple[str, ...] = Field(default=(), description="layers whose features are cached")
    factory: str | None = Field(
        default=None, pattern=r"^[\w.]+:\w+$", description="`module:function`, for kind factory"
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the factory"
    )
    nnunet: NnunetOptions | None = Field(
        default=None, description="for kind nnunet; left out: as nnU-Net itself does by default"
    )
    trained_on: str | None = Field(
        default=None, description="dataset that `pipeline train-teachers` trains it on"
    )
    admission: TeacherAdmission = Field(default_factory=TeacherAdmission)
    licence: str = Field(default="", description="for people; never part of a digest")
    source: str = Field(default="", description="for people; never part of a digest")
    _trusted: bool = PrivateAttr(default=False)

    @property
    def trusted(self) -> bool:
        """Whether the user said that this teacher may run code of its own. No file can say so."""
        return self._trusted

    def trusting(self) -> TeacherEntry:
        """The same entry, trusted."""
        entry = self.model_copy()
        entry._trusted = True
        return entry

    @model_validator(mode="after")
    def _consistent(self) -> TeacherEntry:
        if (self.kind == "factory") != (self.factory is not None):
            raise ValueError("`factory: module:function` belongs to kind `factory`, and only there")
        if self.kind == "nnunet":
            owned = [n for n in ("spacing_mm", "intensity", "args") if n in self.model_fields_set]
            if owned:
                raise ValueError(
                    f"{', '.join(owned)}: not for kind `nnunet`, whose plans.json says how images "
                    "are prepared"
                )
            if self.outputs != "logits":
                raise ValueError("outputs: kind `nnunet` gives logits: leave it out")
            if self.taps:
                raise ValueError(
                    "taps: kind `nnunet` has none, because nnU-Net's windows do not begin at "
                    "multiples of a layer's stride; use a teacher of another kind for features"
                )
        elif self.nnunet is not None:
            raise ValueError("`nnunet` belongs to kind `nnunet`, and only there")
        if self.kind == "exported":
            self._states_all_of_its_preprocessing()
        elif self.kind == "monai-bundle":
            if given := [n for n in ("spacing_mm", "intensity") if n in self.model_fields_set]:
                raise ValueError(f"the bundle's own preprocessing sees to that: leave out {given}")
        elif self.orientation is not None:
            raise ValueError(f"`orientation` is not for kind `{self.kind}`")
        return self

    def key(self) -> dict[str, Any]:
        """What of this entry can change numbers beside the bytes of its weights, as plain JSON
        values."""
        absent = {name for name in _OPTIONS_OF_KINDS if getattr(self, name) is None}
        other = {"admission", "licence", "source", "weights"}
        return self.model_dump(mode="json", exclude=other | absent)

    def _states_all_of_its_preprocessing(self) -> None:
        wanted = ("spacing_mm", "orientation", "intensity")
        missing = [name for name in wanted if name not in self.model_fields_set]
        if missing or self.spacing_mm is None or self.orientation is None:
            raise ValueError(
                f"an exported file does not say what its network wants to see: give {missing}"
            )
        if self.taps:
            raise ValueError(
                "an exported file has no layers to tap: its modules were compiled away. Leave out "
                "`taps`, or use kind `monai-bundle` or `factory`"
            )


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]

_BESIDE_CASE = re.compile(r"\*\{case\}|\{case\}\*")
_DOUBLE_STAR_IN_NAME = re.compile(r"[^/]\*\*|\*\*[^/]")


class GridEntry(Config):
    """The student grid: one spacing for all; each case keeps its own field of view."""

    spacing_mm: tuple[_Positive, _Positive, _Positive] = Field(description="z, y, x")
    orientation: Literal["RAS"] = Field(default="RAS", description="fixed")


class FilesEntry(Config):
    """The part of a dataset's entry that says which files are its cases."""

    root: str = Field(min_length=1, description="folder, relative to the registry's folder")
    images: str | None = Field(default=None, description="pattern with {case}, below root")
    labels: str | None = Field(default=None, description="pattern with {case}, below root")
    pairs: dict[Name, Pair] | None = Field(default=None, description="instead of patterns")
    phantom: PhantomSpec | None = Field(
        default=None, description="if given, `pipeline phantom` generates the files"
    )

    @model_validator(mode="after")
    def _files_named_once(self) -> FilesEntry:
        if (self.pairs is None) == (self.images is None):
            raise ValueError("name the files by `images` and `labels`, or by `pairs`")
        if (self.images is None) != (self.labels is None):
            raise ValueError("`images` and `labels` belong together")
        for pattern in (self.images, self.labels):
            if pattern is not None:
                check_pattern(pattern)
        return self

    def find(self, base: Path) -> tuple[dict[str, FoundPair], list[str]]:
        """The cases, and what is wrong with them; `base` is the registry's folder. Files of a
        phantom need not exist."""
        root = base / Path(self.root).expanduser()
        if self.phantom is None and not os.path.isdir(root):  # noqa: PTH112 - never raises
            return {}, [f"there is no folder {root}. Check `root`."]
        if self.pairs is not None:
            found = {c: FoundPair(root / p.image, root / p.label) for c, p in self.pairs.items()}
            absent = [] if self.phantom is not None else _absent(found)
            return found, _shared_images(self.pairs) + absent
        assert self.images is not None
        assert self.labels is not None
        if self.phantom is None:
            return find_pairs(root, self.images, self.labels)
        both = self.images, self.labels
        return {
            case: FoundPair(*(root / pattern.replace("{case}", case) for pattern in both))
            for case in case_names(self.phantom)
        }, []


class DatasetEntry(FilesEntry):
    """One folder of CTs and the organs that somebody annotated in all of them."""

    annotated: dict[str, OneOrMore] = Field(
        min_length=1, description="organ -> label value, or list of values, that mean it"
    )
    ignore_values: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="label values that mean unknown; such voxels teach nothing"
    )
    background_values: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="label values of structures that are none of the organs"
    )
    # Left out of dumps at its default: datasets of before it existed keep their keys.
    units: Literal["hu", "other"] = Field(
        default="hu",
        description="of the images; other: they are no Hounsfield units, on purpose",
        exclude_if=lambda value: value == "hu",
    )
    split: SplitEntry = Field(default_factory=SplitEntry)
    licence: str = Field(default="", description="for people; never part of a digest")
    source: str = Field(default="", description="for people; never part of a digest")


def check_pattern(pattern: str) -> None:
    """Raises: ValueError: it does not say where a case's name is, below `root`."""
    if pattern.count("{case}") != 1:
        raise ValueError(f"pattern {pattern!r} must contain {{case}} exactly once")
    if Path(pattern).is_absolute():
        raise ValueError(f"pattern {pattern!r} must be relative to `root`")
    if _DOUBLE_STAR_IN_NAME.search(pattern):
        raise ValueError(f"in pattern {pattern!r} ** must stand between slashes, as in a/**/b")
    if _BESIDE_CASE.search(pattern):
        raise ValueError(
            f"pattern {pattern!r} does not say where the case's name begins and ends: "
            "put some other character between * and {case}"
        )


def _absent(found: Mapping[str, FoundPair]) -> list[str]:
    paths = [p for f in found.values() for p in (f.image_path, f.label_path)]
    absent = [str(p) for p in paths if is_absent(p)]
    trouble = f"files do not exist: {listed(absent, MANY)}. Check `root` and `pairs`."
    return [trouble] if absent else []


def _shared_images(pairs: Mapping[str, Pair]) -> list[str]:
    """One image under two names would train and test on the same scan."""
    owner: dict[str, str] = {}
    problems = []
    for case, pair in pairs.items():
        first = owner.setdefault(pair.image, case)
        if first != case:
            problems.append(
                f"cases {first} and {case} have the same image {pair.image}. Keep one of the two."
            )
    return problems
