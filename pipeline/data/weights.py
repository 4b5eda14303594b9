"""Which files are a teacher's weights, and their digest. Nothing here loads a network: stage two,
too, looks whether they are those that its units were made by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.config import FileStamp, digest, stamp_file
from pipeline.data.entries import NnunetOptions, TeacherEntry
from pipeline.errors import TeacherError

# Kinds whose weights are a folder, and which one.
FOLDERS = {
    "monai-bundle": "bundle's folder, unpacked",
    "nnunet": "folder that holds plans.json, dataset.json and fold_0, such as "
    "Dataset003_Liver/nnUNetTrainer__nnUNetPlans__3d_fullres",
}
BUNDLE_CONFIGS = ("inference.json", "inference.yaml", "inference.yml")


def digest_of(entry: TeacherEntry, stamps: Mapping[str, FileStamp]) -> str:
    """Weights in one file: the SHA-256 of its bytes. Weights in a folder: the digest of the SHA-256
    of every file in it that the entry uses, by name relative to the folder."""
    hashes = {name: stamp.sha256 for name, stamp in stamps.items()}
    return digest(hashes) if entry.kind in FOLDERS else hashes[_FILE]


def stamp_weights(
    entry: TeacherEntry,
    path: Path,
    stamp: Callable[[str, Path], FileStamp] = lambda _, file: stamp_file(file),
) -> dict[str, FileStamp]:
    """Hashes the files that a teacher is loaded from: name, file -> its stamp.

    Raises:
        TeacherError: a file that is not there, or cannot be read.
    """
    try:
        files = _files(entry, path)
        return {name: stamp(name, file) for name, file in files.items()}
    except OSError as error:
        raise TeacherError(
            f"the weights cannot be read ({error.strerror}).",
            where=error.filename or path,
            fix="Correct `weights` in the registry; paths are relative to the registry's folder.",
        ) from error


def bundle_config(folder: Path) -> Path | None:
    """The inference config of a MONAI bundle, if there is one."""
    found = [folder / "configs" / name for name in BUNDLE_CONFIGS]
    return next((path for path in found if path.is_file()), None)


def bundle_weights(folder: Path) -> Path:
    """Where a MONAI bundle's weights are, whether they are there or not."""
    return folder / "models" / "model.pt"


def nnunet_checkpoints(path: Path, options: NnunetOptions) -> Mapping[str, Path]:
    """Fold ("0" .. or "all") -> checkpoint file of a model folder, in the order they are averaged.

    Raises:
        TeacherError: a fold or its checkpoint is not there.
    """
    trained = {p.name.removeprefix("fold_"): p for p in path.glob("fold_*") if p.is_dir()}
    if not trained:
        raise TeacherError(
            "the folder holds no fold_0, fold_1 .. fold_all.",
            where=path,
            fix="Copy the trained folds there, or name the folder that has them.",
        )
    if options.folds is not None:
        folds = [str(fold) for fold in options.folds]
    else:
        usable = [fold for fold, p in trained.items() if (p / options.checkpoint).is_file()]
        numbers = sorted((fold for fold in usable if fold.isdigit()), key=int)
        # nnU-Net averages the numbered folds; a model trained on all cases has `fold_all` alone.
        folds = numbers or usable or sorted(trained)[:1]
    for fold in folds:
        if fold not in trained:
            raise TeacherError(
                f"fold {fold} was not trained.",
                where=path,
                fix=f"Folds there: {', '.join(sorted(trained))}. Correct `nnunet.folds`.",
            )
        if not (trained[fold] / options.checkpoint).is_file():
            others = sorted(p.name for p in trained[fold].glob("*.pth"))
            raise TeacherError(
                f"there is no {options.checkpoint}.",
                where=trained[fold],
                fix=f"Its training did not finish. Checkpoints there: {', '.join(others)}; name "
                f"one, as in `nnunet: {{checkpoint: {others[0]}}}`, or train to the end."
                if others
                else "Nothing was trained there: copy its checkpoints, or leave the fold out.",
            )
    return {fold: trained[fold] / options.checkpoint for fold in folds}


_FILE = "weights"


def _files(entry: TeacherEntry, path: Path) -> Mapping[str, Path]:
    match entry.kind:
        case "nnunet":
            checkpoints = nnunet_checkpoints(path, entry.nnunet or NnunetOptions())
            folds = {f"fold_{fold}": checkpoint for fold, checkpoint in checkpoints.items()}
            return {name: path / name for name in ("plans.json", "dataset.json")} | folds
        case "monai-bundle":
            # Scripts, too, which only a trusted config can call.
            config = bundle_config(path)
            files = [bundle_weights(path), *(path / "scripts").rglob("*.py")]
            files += [config] if config else []
            return {file.relative_to(path).as_posix(): file for file in files}
        case _:
            return {_FILE: path}
