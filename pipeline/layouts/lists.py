"""Lists of cases in JSON files (Decathlon, MONAI) -> pairs of files, or patterns that mean them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.data.files import FoundPair, Pair, find_pairs, is_absent
from pipeline.errors import RegistryError

_SPLIT_OF = {
    "training": "train",
    "validation": "validation",
    "testing": "test",
    "test": "test",
}
_ENDINGS = (".nii.gz", ".nii")


def read_lists(
    content: Mapping[str, Any], root: Path, file: Path
) -> tuple[dict[str, Pair], dict[str, tuple[str, ...]] | None, tuple[str, ...]]:
    """Reads `training` and, where they have labels, `validation`, `testing` and `test`.

    Returns:
        case -> files; the split, if more than `training` has labels; what a user should know.

    Raises:
        RegistryError: entries that cannot be read, files that are not there, cases of one name.
    """
    entries: list[tuple[str, Pair]] = []
    num_without = 0
    has_folds = False
    for key, split in _SPLIT_OF.items():
        for index, entry in enumerate(content.get(key) or []):
            pair = _pair(entry, f"{file}: {key}[{index}]")
            has_folds = has_folds or (isinstance(entry, dict) and "fold" in entry)
            if pair is None:
                num_without += 1
            else:
                entries.append((split, pair))
    if not entries:
        raise RegistryError(
            "none of its cases has a label.", where=file, fix="Name a list with image and label."
        )
    _require_files([pair for _, pair in entries], root, file)
    names = _case_names([pair for _, pair in entries], file)
    pairs = {name: pair for name, (_, pair) in zip(names, entries, strict=True)}
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for name, (split, _) in zip(names, entries, strict=True):
        splits[split].append(name)
    notes = [f"{num_without} cases without a label are left out"] if num_without else []
    notes += ["its folds are not used: see `split`"] if has_folds else []
    listed = {key: tuple(cases) for key, cases in splits.items()}
    given = listed if listed["validation"] or listed["test"] else None
    return pairs, given, tuple(notes)


def as_patterns(root: Path, pairs: Mapping[str, Pair]) -> tuple[str, str] | None:
    """Patterns that find exactly these cases by these names, or None if there are none."""
    case, first = next(iter(pairs.items()))
    if first.image.count(case) != 1 or first.label.count(case) != 1:
        return None
    images, labels = (path.replace(case, "{case}") for path in (first.image, first.label))
    if PurePosixPath(images).is_absolute() or PurePosixPath(labels).is_absolute():
        return None
    found, problems = find_pairs(root, images, labels, None)
    wanted = {name: FoundPair(root / p.image, root / p.label) for name, p in pairs.items()}
    return (images, labels) if found == wanted and not problems else None


def _pair(entry: Any, where: str) -> Pair | None:
    """The files of an entry; None if it has no label."""
    if isinstance(entry, str) or (isinstance(entry, dict) and not entry.get("label")):
        return None
    try:
        image, label = entry["image"], entry["label"]
        if not isinstance(image, str) or not isinstance(label, str):
            raise TypeError("image and label are one path each")
        return Pair(image=str(PurePosixPath(image)), label=str(PurePosixPath(label)))
    except (KeyError, TypeError, ValueError) as error:
        raise RegistryError(
            f"not a case ({type(error).__name__}: {error}).",
            where=where,
            fix='A case is {"image": path, "label": path}; images of several files are not read.',
        ) from error


def _require_files(pairs: list[Pair], root: Path, file: Path) -> None:
    absent = [p for pair in pairs for p in (pair.image, pair.label) if is_absent(root / p)]
    if absent:
        raise RegistryError(
            f"{len(absent)} files that it lists do not exist below {root}, the first is "
            f"{absent[0]}.",
            where=file,
            fix="Put the list into the folder that its paths begin at, or correct the paths.",
        )


def _case_names(pairs: list[Pair], file: Path) -> list[str]:
    """By the label's name; by the whole path where that is not enough to tell them apart."""
    for name in (_stem, _path_as_name):
        names = [name(pair.label) for pair in pairs]
        if len(set(names)) == len(names):
            return names
    raise RegistryError(
        "a label is listed more than once.", where=file, fix="List each case once, in one split."
    )


def _stem(path: str) -> str:
    return _as_name(PurePosixPath(_without_ending(path)).name)


def _path_as_name(path: str) -> str:
    return _as_name(_without_ending(path))


def _without_ending(path: str) -> str:
    for ending in _ENDINGS:
        path = path.removesuffix(ending)
    return path


def _as_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).lstrip("_.-") or "case"
