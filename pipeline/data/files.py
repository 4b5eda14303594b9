"""Which files are a case: patterns and explicit pairs -> one image and one label per case."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from pipeline.config import Config
from pipeline.data.phantom_spec import PhantomSpec, case_names

_MANY = 8


class Pair(Config):
    """One case by its files, relative to the dataset's root."""

    image: str = Field(min_length=1, description="the CT")
    label: str = Field(min_length=1, description="its label map")


@dataclass(frozen=True)
class CaseFiles:
    """A case of a dataset: where its image and label are and which split it belongs to."""

    dataset: str
    case: str
    image: Path
    label: Path
    split: str

    @property
    def name(self) -> str:
        """`dataset/case`, as messages name it."""
        return f"{self.dataset}/{self.case}"


@dataclass(frozen=True)
class FoundPair:
    """Files of one case; they need not exist."""

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
        root: folder of the dataset.
        images: pattern with `{case}` (and `*`, `**`) below root, or None.
        labels: likewise.
        pairs: case -> files, instead of patterns.
        phantom: cases that will be generated here; their files need not exist.

    Returns:
        case -> files, and what is wrong, in words for the user.
    """
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
    problems = []
    image_files, repeated = _match(root, images)
    label_files, repeated_labels = _match(root, labels)
    for case, paths in [*repeated.items(), *repeated_labels.items()]:
        files = _some([str(p) for p in paths])
        problems.append(f"case {case} is found more than once: {files}. Narrow the pattern.")
    if not image_files:
        problems.append(
            f"pattern {images!r} matches nothing below {root}. Check `root` and `images`; "
            f"the part that names the case is written {{case}}."
        )
    without = sorted(set(image_files) - set(label_files))
    if without:
        problems.append(
            f"images without a label matching {labels!r}: {_some(without)}. "
            f"Add the labels, or move these images out of `images`."
        )
    return {
        case: FoundPair(path, label_files[case])
        for case, path in sorted(image_files.items())
        if case in label_files
    }, problems


def _absent(found: Mapping[str, FoundPair]) -> list[str]:
    paths = [p for f in found.values() for p in (f.image_path, f.label_path)]
    absent = [str(p) for p in paths if not p.is_file()]
    return [f"files do not exist: {_some(absent)}. Check `root` and `pairs`."] if absent else []


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


def _match(root: Path, pattern: str) -> tuple[dict[str, Path], dict[str, list[Path]]]:
    """Case -> file, and the cases that match more than one; hidden files are no cases."""
    before, after = pattern.split("{case}")
    # ** may stand for no folder at all; {case} stops at a slash.
    expression = re.compile(_regex(before) + r"(?P<case>[^/]+)" + _regex(after))
    found: dict[str, list[Path]] = {}
    for path in sorted(root.glob(f"{before}*{after}")):
        match = expression.fullmatch(path.relative_to(root).as_posix())
        if match and not match["case"].startswith(".") and path.is_file():
            found.setdefault(match["case"], []).append(path)
    repeated = {case: paths for case, paths in found.items() if len(paths) > 1}
    return {case: paths[0] for case, paths in found.items()}, repeated


def _regex(glob: str) -> str:
    text = re.escape(glob)
    return text.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*").replace(r"\?", "[^/]")


def _some(items: list[str]) -> str:
    shown = ", ".join(items[:_MANY])
    return f"{shown} and {len(items) - _MANY} more" if len(items) > _MANY else shown
