"""`cache export`: what is cached of a case, as NIfTI files that any viewer lays over the CT; and
what labels and experts say together of all cases, as a raw dataset of nnU-Net."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.cache.cases import check_same_grid, organ_labels
from pipeline.cache.reader import CachedCase
from pipeline.cache.store import json_text
from pipeline.config import digest
from pipeline.consensus.cohort import (
    RegionRules,
    compute,
    known_organs,
    lazy_consensus,
    lazy_patch,
    open_case,
    open_cohort,
)
from pipeline.consensus.regions import DEFAULT_CONFIDENCE, corrected
from pipeline.data.entries import CaseFiles
from pipeline.data.labels import IGNORE, LabelSpace
from pipeline.data.nifti import (
    NiftiVolume,
    read_header,
    read_image,
    read_label,
    write_image,
    write_like,
)
from pipeline.data.patches import Patch
from pipeline.data.registry import Registry
from pipeline.data.resample import SlabRows
from pipeline.data.volume import Volume
from pipeline.errors import ConfigError, GeometryError, RegistryError, listed
from pipeline.folder import Folder, json_with, refuse_foreign, replace_file, writing
from pipeline.log import Log

_SUFFIX = ".nii.gz"
_REGIONS = ("regions", "agreed_background", "conflict")
_MARK = "organ-distill, cache export"  # in the NIfTI header: what has it may be replaced


def export_nifti(
    work: Folder,
    registry: Registry,
    case: str,
    teachers: Sequence[str],
    output: Path,
    *,
    regions: bool = False,
) -> list[Path]:
    """Writes `<case>/<teacher>_<organ>.nii.gz`: float32 log-odds on the student grid, NaN where the
    teacher did not see; an organ is where they are above 0. `<teacher>=<organ>.nii.gz` where the
    registry has two pairs that would share a name, `k` with `left_x` and `k_left` with `x`.

    Args:
        regions: also write `regions` (uint8: organ ids, 0 agreed background, 255 where teachers
            disagree or abstain), `agreed_background` and `conflict` (0 or 1), from all teachers of
            the registry and the case's label.

    Raises:
        ConfigError: files are there that `cache export` did not write.
        RegistryError: no such dataset or teacher.
        CacheStale, CacheMissing: the registry, the case or a unit is not in the cache.
    """
    for teacher in teachers:
        if teacher not in registry.teachers:
            known = ", ".join(registry.teachers)
            raise RegistryError(
                f"there is no teacher {teacher!r}.", where=registry.path, fix=f"Known: {known}."
            )
    found = open_case(work, registry, case, list(registry.teachers) if regions else teachers)
    folder = output / case
    names = _names(registry)
    odds = {
        folder / f"{names[teacher, organ]}{_SUFFIX}": (teacher, organ)
        for teacher in teachers
        for organ in registry.teachers[teacher].organs
    }
    others = [folder / f"{name}{_SUFFIX}" for name in (_REGIONS if regions else ())]
    refuse_foreign("cache export", [(path, _is_ours(path)) for path in (*odds, *others)])
    with writing(folder):
        for path, (teacher, organ) in odds.items():
            _write(path, found.log_odds(teacher, organ).astype(np.float32), found)
        if regions:
            arrays = _regions(found, registry.label_space)
            for path, array in zip(others, arrays, strict=True):
                _write(path, array, found)
    return [*odds, *others]


def _names(registry: Registry) -> dict[tuple[str, str], str]:
    """Of each teacher and organ; names hold no `=`. Whatever teachers are exported: a file of one
    call is not replaced by another array in the next."""
    pairs = [(t, organ) for t, entry in registry.teachers.items() for organ in entry.organs]
    taken = Counter([*map("_".join, pairs), *_REGIONS])
    return {pair: ("_" if taken["_".join(pair)] == 1 else "=").join(pair) for pair in pairs}


def _regions(case: CachedCase, space: LabelSpace) -> list[npt.NDArray[np.uint8]]:
    """In the order of `_REGIONS`."""
    lazy, known = lazy_consensus(case, space)
    organ, background, conflict = compute(lazy.organ, lazy.background, lazy.conflict)
    regions = np.full(background.shape, IGNORE, dtype=np.uint8)
    regions[background] = 0
    for number, k in enumerate(known):
        regions[organ[number] & ~conflict] = space.ids[space.organs[k]]
    return [regions, background.astype(np.uint8), conflict.astype(np.uint8)]


def _write(path: Path, array: npt.NDArray[Any], case: CachedCase) -> None:
    write_image(path, Volume(array, case.grid), description=_MARK)


def _is_ours(path: Path) -> bool:
    try:
        return bool(read_header(path)[1]["descrip"].item().decode() == _MARK)
    except (GeometryError, UnicodeDecodeError):
        return False


# The cohort as a raw dataset of nnU-Net v2.

_DATASET = re.compile(r"Dataset\d{3}_\w[\w.-]*")
_TOLD = "consensus.json"  # what each label map was made from: those that are there are kept
_SLAB_VOXELS = 4_000_000


def export_nnunet(
    work: Folder, registry: Registry, teachers: Sequence[str], output: Path, log: Log
) -> Path:
    """Writes what labels and experts say together as a dataset that nnU-Net trains on.

    `imagesTr/<dataset>__<case>_0000.nii.gz` leads to the CT (a link; a copy of what is no .nii.gz
    of three axes), `labelsTr/` has a label map in its geometry: the dataset's labels where there
    are any, else the organ whose experts have the highest log-odds above 0, background where all
    organs' experts are below 0, and nnU-Net's `ignore` where somebody is silent. Log-odds, not
    labels, are resampled from the student grid. `imagesTs/` has the CTs of the test split. A case
    that is there, from the same cache and files, is not made again; `dataset.json` is written last.

    Args:
        registry: read with its files.

    Raises:
        ConfigError: a name that nnU-Net does not take, files that were not written here, cases
            that would share a name, or no training case.
        CacheStale, CacheMissing, CacheError: the registry, a case or a unit is not in the cache.
        GeometryError: a CT or label that cannot be read.
    """
    if not _DATASET.fullmatch(output.resolve().name):
        raise ConfigError(
            "nnU-Net takes folders named Dataset123_Name: three digits and a name.",
            where=output,
            fix="Name --output so, in your nnUNet_raw: nnUNet_raw/Dataset501_Organs.",
        )
    asked = [name for name in registry.teachers if name in teachers]
    splits = ("train", "validation")
    cohort = open_cohort(work, registry, teachers=asked, splits=splits)
    for problem in cohort.problems.values():
        raise problem
    cached = {case.name: case for case in cohort.cases}
    sources = [case for name in registry.datasets for case in registry.cases(name)]
    names = _nnunet_names(sources, output)
    before = json_with(output / _TOLD, "cases", "labels")
    earlier = {} if before is None else before["cases"]
    kept = {name: made for name, made in earlier.items() if name in cached}
    told: dict[str, Any] = {"labels": _nnunet_labels(registry.label_space), "cases": kept}
    targets = [output / "dataset.json", output / "splits_final.json", output / _TOLD]
    targets += [_place(output, source, names) for source in sources]
    targets += [output / "labelsTr" / f"{names[name]}{_SUFFIX}" for name in cached]
    refuse_foreign("cache export", [(path, before is not None) for path in targets])
    if not cached:
        raise ConfigError(
            "no case is in the training or validation split.",
            where=registry.path,
            fix="Set `split` in the registry and run `pipeline cache-teachers`.",
        )
    with writing(output), log.progress("nnU-Net dataset", len(sources)) as advance:
        replace_file(output / _TOLD, json_text(told).encode())  # from here on the folder is ours
        for source in sources:
            _link(_place(output, source, names), source)
            if source.name in cached:
                path = output / "labelsTr" / f"{names[source.name]}{_SUFFIX}"
                known = kept.get(source.name, {})
                made = _consensus_label(path, registry, source, cached[source.name], known)
                kept[source.name] = made
                replace_file(output / _TOLD, json_text(told).encode())
            advance(source.name)
        _write_lists(output, registry, sources, names, told)
    return output / "dataset.json"


def _nnunet_names(sources: Sequence[CaseFiles], output: Path) -> dict[str, str]:
    names = {source.name: source.name.replace("/", "__") for source in sources}
    twice = [name for name, number in Counter(names.values()).items() if number > 1]
    if twice:
        raise ConfigError(
            f"two cases would be named {listed(twice)}.",
            where=output,
            fix="Rename one of the datasets or cases in the registry.",
        )
    return names


def _nnunet_labels(space: LabelSpace) -> dict[str, int]:
    """nnU-Net wants 0, 1, 2 .. without a gap, and `ignore` last."""
    return {"background": 0, **{organ: k + 1 for k, organ in enumerate(space.organs)}}


def _place(output: Path, source: CaseFiles, names: Mapping[str, str]) -> Path:
    folder = "imagesTs" if source.split == "test" else "imagesTr"
    return output / folder / f"{names[source.name]}_0000{_SUFFIX}"


def _link(path: Path, source: CaseFiles) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # nnU-Net's reader takes three axes alone, even where a fourth has but one entry.
    nifti = source.image.name.endswith(_SUFFIX)
    if nifti and len(read_header(source.image)[1].get_data_shape()) == 3:
        if not path.is_symlink() or path.resolve() != source.image.resolve():
            path.unlink(missing_ok=True)
            path.symlink_to(source.image.resolve())
    elif path.is_symlink() or not path.exists():
        path.unlink(missing_ok=True)
        image = read_image(source.image)
        write_image(path, image.volume, affine_xyz=image.file_affine, description=_MARK)


def _consensus_label(
    path: Path, registry: Registry, source: CaseFiles, case: CachedCase, known: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes a label map, unless it is there; says what it is of, and the voxels of each value."""
    made_of = digest(
        [case.case.receipt.digest, {t: unit.receipt.digest for t, unit in case.teachers.items()},
         list(registry.label_space.organs)]
    )  # fmt: skip
    if path.exists() and known.get("digest") == made_of:
        return dict(known)
    image, label = read_image(source.image), read_label(source.label)
    check_same_grid(image, label, source.name)
    classes = np.empty(image.volume.grid.shape, dtype=np.uint8)
    for begin, rows in _consensus_rows(registry, source, case, image, label):
        classes[begin : begin + len(rows)] = rows
    write_like(path, Volume(classes, image.volume.grid), source.image)
    counts = zip(*np.unique(classes, return_counts=True), strict=True)
    return {"digest": made_of, "voxels": {str(value): int(number) for value, number in counts}}


def _consensus_rows(
    registry: Registry, source: CaseFiles, case: CachedCase, image: NiftiVolume, label: NiftiVolume
) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Rows of the CT's grid along z: 0 background, k + 1 for organ k of the registry, K + 1
    ignore."""
    space, grid = registry.label_space, image.volume.grid
    known = known_organs(case, space)
    within = LabelSpace({space.organs[k]: space.ids[space.organs[k]] for k in known})
    labels = within.to_classes(organ_labels(registry, source, label))
    annotated = tuple(n for n, organ in enumerate(within.organs) if organ in case.annotated)
    numbers = np.array([0, *(k + 1 for k in known)], dtype=np.uint8)
    silent = len(known) < len(space.organs)
    rows = SlabRows(case.grid, grid, outside=np.nan)
    depth, height, width = case.grid.shape
    at_once = max(1, _SLAB_VOXELS // (height * width * max(1, len(known))))
    by_teachers = RegionRules(labels_win=False)
    for begin in range(0, depth, at_once):
        patch = Patch((begin, 0, 0), (min(at_once, depth - begin), height, width))
        nothing = np.zeros(patch.shape, dtype=np.uint8)
        (odds,) = compute(lazy_patch(case, within, by_teachers, patch, nothing))
        for z, d in rows.put(odds):
            said = labels[z : z + d.shape[1]]
            d = corrected(d, said, annotated, DEFAULT_CONFIDENCE)
            best = np.where(np.isnan(d), -np.inf, d)
            found = np.where(best.max(axis=0) > 0, best.argmax(axis=0) + 1, 0)
            unknown = (found == 0) & (silent | np.isnan(d).any(axis=0))
            yield z, np.where(unknown, len(space.organs) + 1, numbers[found]).astype(np.uint8)
    rows.check_complete()


def _write_lists(
    output: Path,
    registry: Registry,
    sources: Sequence[CaseFiles],
    names: Mapping[str, str],
    told: Mapping[str, Any],
) -> None:
    labels = dict(told["labels"])
    ignore = str(len(labels))
    if any(ignore in case["voxels"] for case in told["cases"].values()):
        labels["ignore"] = len(labels)
    training = [source for source in sources if source.name in told["cases"]]
    held_out = [s.name for s in training if s.split == "validation"]
    folds = [[s.name for s in training if s.fold == k] for k in range(registry.num_folds)]
    splits = [
        {
            "train": [names[s.name] for s in training if s.name not in val],
            "val": [names[name] for name in val],
        }
        for val in folds or [held_out]
    ]
    if splits[0]["val"]:
        replace_file(output / "splits_final.json", json_text(splits).encode())
    dataset = {
        "channel_names": {"0": "CT"}, "labels": labels, "numTraining": len(training),
        "file_ending": _SUFFIX, "name": output.resolve().name,
        # Its usual reader keeps each file's order of axes, which differs between hospitals.
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
        "description": f"Labels and experts together, by {_MARK}; see {_TOLD}.",
        "licence": "; ".join(
            f"{name}: {entry.licence}" for name, entry in registry.datasets.items() if entry.licence
        ),
    }  # fmt: skip
    replace_file(output / "dataset.json", json_text(dataset).encode())
