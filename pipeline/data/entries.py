"""What a registry says of one dataset, one phantom, one teacher. Data only: nothing is loaded or
drawn when it is read.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
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
from pipeline.data.dicom import is_series
from pipeline.data.labels import Intensity
from pipeline.data.splits import SplitEntry, in_words
from pipeline.data.volume import Orientation
from pipeline.errors import GeometryError, RegistryError, counted, listed

# Which files are a case: patterns and explicit pairs -> one image and one label per case.

MAGIC = "*?["
_MANY = 8
_ANNEX = ".git/annex/objects"


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


@dataclass(frozen=True)
class FoundPair:
    """Files of one case; that they can be opened is for `require_file` to say."""

    image_path: Path
    label_path: Path


def find_pairs(
    root: Path,
    images: str | None,
    labels: str | None,
    pairs: Mapping[str, Pair] | None,
    phantom: PhantomSpec | None = None,
) -> tuple[dict[str, FoundPair], list[str]]:
    """Finds the cases of a dataset.

    Args:
        images, labels: patterns with `{case}` (and `*`, `**`) below root, or None.
        pairs: case -> files, instead of patterns.
        phantom: cases that will be generated here; their files need not exist.

    Returns:
        case -> files, and what is wrong with the dataset, in words for the user. A file that is
        there by name and cannot be opened is the trouble of its case alone: the case is found, so
        that no split changes, and fails where it is opened.
    """
    if phantom is None and not os.path.isdir(root):  # noqa: PTH112 - never raises
        return {}, [f"there is no folder {root}. Check `root`."]
    if pairs is not None:
        found = {c: FoundPair(root / p.image, root / p.label) for c, p in pairs.items()}
        return found, _shared_images(pairs) + ([] if phantom is not None else _absent(found))
    assert images is not None
    assert labels is not None
    if phantom is not None:
        names = case_names(phantom)
        return {
            c: FoundPair(root / images.replace("{case}", c), root / labels.replace("{case}", c))
            for c in names
        }, []
    problems: list[str] = []
    image_files, label_files = (
        match_files(root, pattern, problems) for pattern in (images, labels)
    )
    # Side by side, {case}.nii.gz also matches the label of another case, {case}_seg.nii.gz.
    label_of = {path: case for case, path in label_files.items()}
    image_files = {c: path for c, path in image_files.items() if label_of.get(path, c) == c}
    if not image_files:
        problems.append(
            f"pattern {images!r} matches nothing below {root}. Check `root` and `images`; "
            f"the part that names the case is written {{case}}."
        )
    without = sorted(set(image_files) - set(label_files))
    if without:
        problems.append(
            f"images without a label matching {labels!r}: {listed(without, _MANY)}. "
            f"Add the labels, or move these images out of `images`."
        )
    return {
        case: FoundPair(path, label_files[case])
        for case, path in sorted(image_files.items())
        if case in label_files
    }, problems


def _absent(found: Mapping[str, FoundPair]) -> list[str]:
    paths = [p for f in found.values() for p in (f.image_path, f.label_path)]
    absent = [str(p) for p in paths if is_absent(p)]
    trouble = f"files do not exist: {listed(absent, _MANY)}. Check `root` and `pairs`."
    return [trouble] if absent else []


def is_absent(path: Path) -> bool:
    """Whether nothing of that name is there; what cannot be known is for `require_file`."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


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


def match_files(root: Path, pattern: str, problems: list[str]) -> dict[str, Path]:
    """Case -> file; hidden files are no cases. Adds to `problems`."""
    pattern = "/".join(part for part in pattern.split("/") if part not in ("", "."))
    before, after = pattern.split("{case}")
    # ** may stand for no folder at all; {case} stops at a slash.
    expression = re.compile(_regex(before) + r"(?P<case>[^/]+)" + _regex(after))
    found: dict[str, list[Path]] = {}
    paths, troubles = search_files(root, f"{before}*{after}".replace("[", "[[]"))
    for path in paths:
        match = expression.fullmatch(path)
        if match and not match["case"].startswith("."):
            found.setdefault(name_of(match["case"]), []).append(root / path)
    for case, files in found.items():
        # By way of a link to its folder a file is found twice, and is one.
        if len(files) > 1 and len({os.path.realpath(file) for file in files}) > 1:
            named = listed([name_of(file) for file in files], _MANY)
            troubles.append(f"case {case} is found more than once: {named}. Narrow the pattern.")
    problems += [trouble for trouble in troubles if trouble not in problems]
    return {case: files[0] for case, files in found.items()}


def _regex(glob: str) -> str:
    text = re.escape(glob)
    return text.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*").replace(r"\?", "[^/]")


def search_files(root: Path, pattern: str) -> tuple[list[str], list[str]]:
    """What is there by a name that a pattern matches, whether it can be opened or not.

    Args:
        pattern: `*`, `?` and `[..]` within a name, `**` for any number of folders, which may be
            links. A part that is the name of something there means that.

    Returns:
        paths below root, sorted; and folders that cannot be looked into, in words for the user.
    """
    search = _Search(root)
    parts = pattern.split("/")
    return sorted(set(search.below("", parts, frozenset()))), list(dict.fromkeys(search.problems))


class _Search:
    """Folders are text that is empty or ends in a slash: of a big tree, paths would take long."""

    def __init__(self, root: Path) -> None:
        self._root = f"{root}/"
        self.problems: list[str] = []

    def below(
        self, folder: str, parts: Sequence[str], above: frozenset[tuple[int, int]]
    ) -> Iterator[str]:
        """Args: `above`: device and inode of the folders that a `**` went through."""
        part, rest = parts[0], parts[1:]
        if part == "**":
            yield from self.below(folder, rest or ["*"], frozenset())
            for entry in self._entries(folder):
                if self._is_folder(entry) and (inner := self._enter(entry, above)) is not None:
                    yield from self.below(f"{folder}{entry.name}/", parts, inner)
        elif rest and not any(c in part for c in MAGIC):
            yield from self.below(f"{folder}{part}/", rest, above)
        elif self._is_there(folder, part):
            yield from self.below(f"{folder}{part}/", rest, above) if rest else [folder + part]
        else:
            for entry in self._entries(folder):
                if fnmatchcase(entry.name, part):
                    if not rest:
                        yield folder + entry.name
                    elif self._is_folder(entry):
                        yield from self.below(f"{folder}{entry.name}/", rest, above)

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self._root + folder) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            self._closed(self._root + folder, str(error.strerror))
            return []

    def _is_there(self, folder: str, part: str) -> bool:
        try:
            os.lstat(f"{self._root}{folder}{part}")
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            self._closed(self._root + folder, str(error.strerror))
            return False
        return True

    def _is_folder(self, entry: os.DirEntry[str]) -> bool:
        try:
            if entry.is_dir():
                return True
            if not entry.is_symlink() or Path(entry.path).exists():
                return False
            why = f"it is a link to {Path(entry.path).readlink()}, which is not there"
        except OSError as error:
            why = str(error.strerror)
        path = Path(entry.path)
        # A link of a file that was not fetched, such as LICENSE, must not stop anybody.
        if not path.suffix and not (entry.is_symlink() and _ANNEX in str(path.readlink())):
            self._closed(entry.path, why)
        return False

    def _enter(
        self, entry: os.DirEntry[str], above: frozenset[tuple[int, int]]
    ) -> frozenset[tuple[int, int]] | None:
        """`above` with this folder; None: it is among them."""
        if not above:
            there = Path(entry.path).parent.stat()
            above = frozenset({(there.st_dev, there.st_ino)})
        here = entry.stat()
        if (here.st_dev, here.st_ino) not in above:
            return above | {(here.st_dev, here.st_ino)}
        path = Path(entry.path)
        link = next((one for one in (path, *path.parents) if one.is_symlink()), path)
        self.problems.append(f"the link {name_of(link)} leads in a circle. Remove it.")
        return None

    def _closed(self, folder: str, why: str) -> None:
        where = name_of(folder.rstrip("/"))
        self.problems.append(f"{where} cannot be looked into ({why}). Mend it, or remove it.")


def name_of(path: str | Path) -> str:
    """A file's name as text that can be printed and written anywhere, whatever the locale; bytes
    that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def require_file(path: Path) -> None:
    """Without reading it: that a file can be opened, and that its name can be written down.

    Raises:
        GeometryError: a link to what is not there, a folder without DICOM files, no permission, a
            name not in UTF-8.
    """
    fix = "Check the path and its permissions; for a phantom run `pipeline phantom`."
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode) and is_series(path):
            return
        if not stat.S_ISREG(mode):
            why = "it is a folder" if stat.S_ISDIR(mode) else "it is no file"
            fix = "Put the file itself there."
        elif not os.access(path, os.R_OK):
            why = "Permission denied"
        elif os.fsencode(path).decode("utf-8") == str(path):
            return
        else:
            raise UnicodeError
    except OSError as error:
        why = str(error.strerror)
        if os.path.islink(path):  # noqa: PTH114 - never raises
            why += f"; it is a link to {path.readlink()}"
            fix = "Fetch what it leads to (`datalad get`, `git annex get`), or remove the link."
    except UnicodeDecodeError:
        why, fix = "its name is not UTF-8", "Rename it."
    except UnicodeError:
        why = f"its name cannot be spelt in {sys.getfilesystemencoding()}, as this session is set"
        fix = "Set PYTHONUTF8=1 and run the command again."
    raise GeometryError(f"the file cannot be read ({why}).", where=path, fix=fix)


def closed_cases(cases: Iterable[CaseFiles]) -> dict[str, str]:
    """Of the cases with a file that `require_file` refuses: `dataset/case` -> why."""
    found: dict[str, str] = {}
    for case in cases:
        try:
            require_file(case.image)
            require_file(case.label)
        except GeometryError as error:
            found[case.name] = str(error)
    return found


def refuse_closed(found: Mapping[str, str], registry: Path) -> None:
    """Raises: RegistryError: there are `closed_cases`; it counts and names them."""
    if not found:
        return
    cases = listed([f"{case}: {why}" for case, why in found.items()], _MANY, "\n  ")
    raise RegistryError(
        f"{counted(len(found), 'case')} cannot be opened:\n  {cases}",
        where=registry,
        fix="Mend what is named, or name the cases to use in `split`.",
    )


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


# What a registry says about one teacher. Data only: nothing here loads a network.


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


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
    spacing_mm: tuple[float, float, float] | None = Field(
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
        if self.spacing_mm is not None and min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm {self.spacing_mm} must be positive")
        match self.kind:
            case "exported":
                self._states_all_of_its_preprocessing()
            case "monai-bundle":
                self._leaves_preprocessing_to_the_bundle()
            case _ if self.orientation is not None:
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

    def _leaves_preprocessing_to_the_bundle(self) -> None:
        given = [name for name in ("spacing_mm", "intensity") if name in self.model_fields_set]
        if given:
            raise ValueError(f"the bundle's own preprocessing sees to that: leave out {given}")


# What a registry says about the student grid and about one dataset. Data only: no file is read.

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]

_BESIDE_CASE = re.compile(r"\*\{case\}|\{case\}\*")
_DOUBLE_STAR_IN_NAME = re.compile(r"[^/]\*\*|\*\*[^/]")


class GridEntry(Config):
    """The student grid: one spacing for all; each case keeps its own field of view."""

    spacing_mm: tuple[float, float, float] = Field(description="z, y, x")
    orientation: Literal["RAS"] = Field(default="RAS", description="fixed")

    @model_validator(mode="after")
    def _positive(self) -> GridEntry:
        if min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm {self.spacing_mm} must be positive")
        return self


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
                _check_pattern(pattern)
        return self

    def find(self, base: Path) -> tuple[dict[str, FoundPair], list[str]]:
        """The cases, and what is wrong with them; `base` is the registry's folder."""
        root = base / Path(self.root).expanduser()
        return find_pairs(root, self.images, self.labels, self.pairs, self.phantom)


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


def _check_pattern(pattern: str) -> None:
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
