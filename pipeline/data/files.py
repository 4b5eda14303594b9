"""Which files are a case: patterns -> one image and one label per case; and whether they can be
opened.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.data.dicom import is_series
from pipeline.errors import GeometryError, RegistryError, counted, listed

if TYPE_CHECKING:
    from pipeline.data.entries import CaseFiles

MAGIC = "*?["
MANY = 8
_ANNEX = ".git/annex/objects"


class FoundPair(NamedTuple):
    """Files of one case; that they can be opened is for `require_file` to say."""

    image_path: Path
    label_path: Path


def find_pairs(root: Path, images: str, labels: str) -> tuple[dict[str, FoundPair], list[str]]:
    """Finds cases by patterns with `{case}` (and `*`, `**`) below root.

    Returns:
        case -> files, and what is wrong, in words for the user. A file that is there by name and
        cannot be opened is the trouble of its case alone: the case is found, so that no split
        changes, and fails where it is opened.
    """
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
            f"images without a label matching {labels!r}: {listed(without, MANY)}. "
            f"Add the labels, or move these images out of `images`."
        )
    return {
        case: FoundPair(path, label_files[case])
        for case, path in sorted(image_files.items())
        if case in label_files
    }, problems


def is_absent(path: Path) -> bool:
    """Whether nothing of that name is there; what cannot be known is for `require_file`."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


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
            named = listed([name_of(file) for file in files], MANY)
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
    cases = listed([f"{case}: {why}" for case, why in found.items()], MANY, "\n  ")
    raise RegistryError(
        f"{counted(len(found), 'case')} cannot be opened:\n  {cases}",
        where=registry,
        fix="Mend what is named, or name the cases to use in `split`.",
    )
