"""The images that are to be predicted, by the names of their label maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.data.registry import Registry
from pipeline.errors import ConfigError

_SUFFIXES = (".nii.gz", ".nii")
_MAGIC = "*?["


def find_inputs(*given: Path) -> dict[str, Path]:
    """NIfTI files by the names that their label maps get.

    Args:
        given: a file, a folder (all files in it but hidden ones), or a pattern such as
            `scans/*.nii.gz` or `scans/**/ct.nii.gz`. Names are those of files without suffix; of
            a pattern with folders, paths from the first folder that is not spelt out.

    Raises:
        ConfigError: nothing there, or two files whose label maps would have one name.
    """
    found: dict[str, Path] = {}
    for path in given:
        here = _found(path)
        if not here:
            raise ConfigError(
                "no NIfTI file there.",
                where=path,
                fix="Give a .nii.gz file, a folder of them, or a pattern in quotes.",
            )
        for name, file in here:
            if name in found and found[name] != file:
                raise ConfigError(
                    f"{_told(file, found[name])} would give one label map.",
                    where=path,
                    fix="Rename one of them, move it elsewhere, or give a pattern in quotes: of "
                    "'cases/*/ct.nii.gz' the folders are part of the names.",
                )
            found[name] = file
    return found


def chosen_inputs(
    images: Sequence[Path] | Path | None, registry: Registry | None, splits: Sequence[str] | None
) -> dict[str, Path]:
    """The images of files, folders and patterns, or of a registry's cases as `<dataset>/<case>`.

    Args:
        images: see `find_inputs`.
        registry: read without its files; instead of `images`.
        splits: of the registry; None: test.

    Raises:
        ConfigError: both or neither are given, or nothing is there.
    """
    if bool(images) == (registry is not None) or (images and splits):
        raise ConfigError(
            "it takes images, or a registry and splits of it.",
            where="pipeline predict",
            fix="Give IMAGES alone, or --registry with --split.",
        )
    if registry is None:
        assert images is not None
        return find_inputs(*([images] if isinstance(images, Path) else images))
    wanted = splits or ["test"]
    cases = [c for d in registry.datasets for c in registry.cases(d) if c.split in wanted]
    if not cases:
        notes = "".join(f"; {note}" for note in registry.empty_splits(wanted))
        raise ConfigError(
            f"no case is in {' or '.join(wanted)}.",
            where=registry.path,
            fix=f"Set `split` in the registry, or give another --split{notes or '.'}",
        )
    return {case.name: case.image for case in cases}


def _found(path: Path) -> list[tuple[str, Path]]:
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.name[0] != ".")
        return [(_stem(f.name), f) for f in files if _is_nifti(f)]
    if path.exists() or not any(c in str(path) for c in _MAGIC):
        return [(_stem(path.name), path)] if _is_nifti(path) else []
    parts = path.parts
    first = next(n for n, part in enumerate(parts) if any(c in part for c in _MAGIC))
    root = Path(*parts[:first])
    files = sorted(root.glob(str(Path(*parts[first:]))))
    return [
        (_stem(relative.as_posix()), file)
        for file in files
        for relative in [file.relative_to(root)]
        if _is_nifti(file) and not any(part.startswith(".") for part in relative.parts)
    ]


def _is_nifti(file: Path) -> bool:
    return file.is_file() and file.name.endswith(_SUFFIXES)


def _told(one: Path, other: Path) -> str:
    if one.parent == other.parent:
        return f"{one.name} and {other.name}"
    return f"{one} and {other}"


def _stem(name: str) -> str:
    for suffix in _SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name
