"""What `pipeline inspect` does, with a case and without: maps that any viewer lays over each
other, a figure, a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt

from pipeline.cache.reader import CachedCase
from pipeline.consensus.cohort import open_case, open_cohort
from pipeline.consensus.reliability import read_validation_scores, trusting
from pipeline.data.labels import IGNORE
from pipeline.data.nifti import write_image
from pipeline.data.registry import Registry
from pipeline.data.volume import Volume
from pipeline.errors import CacheMissing, ConfigError
from pipeline.figures import (
    BACKGROUND_COLOUR,
    Marked,
    hex_colour,
    itksnap_text,
    save_planes,
    slicer_text,
)
from pipeline.folder import (
    Folder,
    contains,
    json_with,
    refuse_foreign,
    replace_file,
    replace_files,
    writing,
)
from pipeline.log import Log
from pipeline.review.inspect.look import BOTH, FALSE_POSITIVE, MISS, CaseLook, View, look_at
from pipeline.review.inspect.numbers import (
    CaseNumbers,
    CohortNumbers,
    flagged,
    lazy_numbers,
    measure_cohort,
    numbers_of,
    to_csv,
)


def inspect_case(
    registry: Registry,
    work: Folder,
    name: str,
    view: View,
    output: Path,
    *,
    allow_missing: bool = False,
) -> tuple[CaseNumbers, list[Path]]:
    """Writes `<output>/<dataset>/<case>/`: maps as NIfTI, colours, `figure.png`, `numbers.json`;
    `allow_missing` leaves out teachers whose units are missing or damaged.

    Raises:
        ConfigError: the registry has no teacher, or there are files that `inspect` did not write.
        RegistryError: no such dataset.
        CacheError: the case or a unit is not in the cache, or is damaged.
        WorkFolderError: the output cannot be written.
    """
    _check_teachers(registry)
    teachers = list(registry.teachers)
    case = open_case(work, registry, name, teachers, allow_missing=allow_missing)
    (case,) = _with_reliability([case], registry, work, view)
    look = look_at(case, registry.label_space, view)
    folder = output / name
    numbers_file, figure = folder / "numbers.json", folder / "figure.png"
    is_ours = json_with(numbers_file, "case", "volume_ml") is not None
    targets = [numbers_file, figure, *(folder / file for file in files_of(look))]
    refuse_foreign("inspect", [(path, is_ours) for path in targets])
    lazy = lazy_numbers(case, look)
    found, computed = compute_maps(case, look, lazy.arrays)
    numbers = flagged(numbers_of(case, look, lazy, computed), {})
    with writing(folder, "Name another folder with --output."):
        # First: by it the next call knows the folder for its own.
        replace_file(numbers_file, json.dumps(numbers.model_dump(mode="json"), indent=1).encode())
        written = write_maps(folder, case, look, found)
        draw_case(figure, case, look, found, numbers)
    return numbers, [*written, figure, numbers_file]


def inspect_cohort(
    registry: Registry,
    work: Folder,
    view: View,
    output: Path,
    *,
    allow_missing: bool = False,
    workers: int = 0,
    log: Log,
) -> CohortNumbers:
    """Measures every case of the registry; writes `<output>/cohort.csv` and `cohort.json`.

    A case that lacks a teacher's unit, or cannot be read, is named in `failed`; the others are
    measured all the same; with `allow_missing` also one that lacks teachers, by those it has.

    Raises:
        ConfigError: the registry has no teacher, or there are files that `inspect` did not write.
        CacheStale: stage one has not seen the registry as it is now.
        CacheMissing: there is no case at all.
        WorkFolderError: the output cannot be written.
    """
    _check_teachers(registry)
    table, whole = output / "cohort.csv", output / "cohort.json"
    ours = {
        table: contains(table, "improbable\n"),
        whole: json_with(whole, "cases", "usual", "pairs") is not None,
    }
    refuse_foreign("inspect", ours.items())
    cohort = open_cohort(work, registry, teachers=list(registry.teachers))
    of_cases = {unit: error for unit, error in cohort.problems.items() if " x " not in unit}
    failed = of_cases if allow_missing else dict(cohort.problems)
    absent = [unit for unit, error in of_cases.items() if isinstance(error, CacheMissing)]
    if allow_missing and absent:
        log.remark(f"cases that are not in the cache and left out: {', '.join(absent)}")
        failed = {unit: error for unit, error in failed.items() if unit not in absent}
    incomplete = {unit.rpartition(" x ")[2] for unit in failed}
    cases = [case for case in cohort.cases if case.name not in incomplete]
    if not cohort.cases:
        nothing = CacheMissing(
            "there is no case in the cache.", where=work, fix="Run `pipeline cache-teachers`."
        )
        raise next(iter(cohort.problems.values()), nothing)
    weighed = _with_reliability(cases, registry, work, view)
    found = measure_cohort(weighed, registry.label_space, view, workers=workers, log=log)
    found = CohortNumbers(found.cases, found.usual, {**failed, **found.failed})
    texts = {table: to_csv(found), whole: json.dumps(found.to_json(), indent=1)}
    with writing(output, "Name another folder with --output."):
        replace_files({path: text.encode() for path, text in texts.items()})
    return found


def _with_reliability(
    cases: Sequence[CachedCase], registry: Registry, work: Folder, view: View
) -> Sequence[CachedCase]:
    """With what a training would ignore of their teachers; cases of every split alike."""
    if view.reliability is None:
        return cases
    scores = read_validation_scores(work, registry, Log(quiet=True))
    labelled = open_cohort(work, registry, splits=("train", "validation")).cases
    return trusting(cases, labelled, scores, view.reliability)


def _check_teachers(registry: Registry) -> None:
    if not registry.teachers:
        raise ConfigError(
            "the registry has no teachers, so there are no regions to look at.",
            where=registry.path,
            fix="Add teachers and run `pipeline cache-teachers`.",
        )


# One case as NIfTI files on the student grid, that any viewer lays over each other.

Array = npt.NDArray[Any]
_SNAP_LABELS, _SLICER_COLOURS = "organs.label.txt", "organs.ctbl"


@dataclass(frozen=True)
class CaseMaps:
    """What is written of a case, (D, H, W) each: int16 HU, uint8 organ ids, 255 ignore, and by the
    names of their files the maps of `lazy_maps`."""

    image: Array
    label: Array
    maps: Mapping[str, Array]


def lazy_maps(look: CaseLook) -> Mapping[str, da.Array]:
    """Each map by the name of its file; those of split experts only where an organ has several.

    - `regions`: organ ids; in a conflict the organ with the larger log-odds; 0 elsewhere.
    - `agreed_background`, `abstained`: 0 or 1.
    - `unclaimed`: 0 or 1, background as far as it is known; only where a claim is ignored.
    - `conflicts`: in how many organ regions, where that is two or more.
    - `against_label`: 1 false positive, 2 miss, 3 both (`pipeline.review.inspect.look`).
    - `split_experts`: of how many organs the experts decide differently.
    - `spread`: the largest spread of any organ's experts, float32 log-odds.
    """
    maps = {
        "regions": look.region_ids(),
        "agreed_background": look.regions.background.view(np.uint8),
        "conflicts": look.num_claims(),
        "abstained": look.regions.abstained.view(np.uint8),
        "against_label": look.against_label(),
    }
    if look.has_ignored_claims:
        maps["unclaimed"] = look.regions.unclaimed.view(np.uint8)
    if look.has_rivals:
        maps |= {"split_experts": look.num_split(), "spread": look.spread()}
    return maps


def compute_maps(
    case: CachedCase, look: CaseLook, also: Sequence[da.Array] = ()
) -> tuple[CaseMaps, tuple[Array, ...]]:
    """Every map, and other arrays of the same look, in one pass: at no time are more log-odds in
    memory than those of a few chunks.

    Raises:
        CacheError: damage that only reading finds.
    """
    lazy = lazy_maps(look)
    maps = {name: np.empty(array.shape, array.dtype) for name, array in lazy.items()}
    stored = da.store(list(lazy.values()), list(maps.values()), lock=False, compute=False)
    # As it was built, like `cohort.compute`: fusing thousands of tasks takes longer than it saves.
    _, *others = dask.compute(stored, *also, scheduler=dask.get, optimize_graph=False)
    return CaseMaps(case.image(), case.label(), maps), tuple(others)


def files_of(look: CaseLook) -> list[str]:
    """Names of all that `write_maps` writes."""
    maps = [f"{name}.nii.gz" for name in ("image", "label", *lazy_maps(look))]
    return [*maps, _SNAP_LABELS, _SLICER_COLOURS]


def write_maps(folder: Path, case: CachedCase, look: CaseLook, found: CaseMaps) -> list[Path]:
    """Writes the CT, the label and every map as `.nii.gz`, and the organs' names and colours for
    ITK-SNAP (`organs.label.txt`) and 3D Slicer (`organs.ctbl`)."""
    written = []
    for name, array in {"image": found.image, "label": found.label, **found.maps}.items():
        path = folder / f"{name}.nii.gz"
        write_image(path, Volume(array, case.grid))
        written.append(path)
    names = {**dict(zip(look.ids, look.organs, strict=True)), IGNORE: "ignored"}
    tables = {
        _SNAP_LABELS: itksnap_text(names),
        _SLICER_COLOURS: slicer_text(names, _SLICER_COLOURS),
    }
    replace_files({folder / name: text.encode() for name, text in tables.items()})
    return [*written, *(folder / name for name in tables)]


# One case as a figure: three planes through its organs, a column per question.

_ONE_OR_MORE = tuple(range(1, 256))
CONFLICT_COLOUR = "#d50000"


def draw_case(
    path: Path, case: CachedCase, look: CaseLook, found: CaseMaps, numbers: CaseNumbers
) -> None:
    """Writes a PNG."""
    ids = dict(zip(look.organs, look.ids, strict=True))
    label = {o: Marked(found.label, (ids[o],)) for o in look.organs if o in case.annotated}
    regions = {o: Marked(found.maps["regions"], (i,)) for o, i in ids.items()}
    background = {"agreed background": Marked(found.maps["agreed_background"], (1,))}
    unsure = {
        "conflict": Marked(found.maps["conflicts"], _ONE_OR_MORE),
        "abstained": Marked(found.maps["abstained"], (1,)),
    }
    against = found.maps["against_label"]
    disagreement = {
        "false positive": Marked(against, (FALSE_POSITIVE, BOTH)),
        "miss": Marked(against, (MISS, BOTH)),
    }
    if "split_experts" in found.maps:
        disagreement["split experts"] = Marked(found.maps["split_experts"], _ONE_OR_MORE)
    panels = {
        "CT": {},
        f"label ({', '.join(label) or 'none'})": label,
        "organ regions": regions,
        "agreed background": background,
        "conflict, abstained": unsure,
        "teachers against label": disagreement,
    }
    colours = {
        **{organ: hex_colour(organ_id) for organ, organ_id in ids.items()},
        "agreed background": BACKGROUND_COLOUR,
        "conflict": CONFLICT_COLOUR,
        "abstained": "#ffffff",
        "false positive": "#76ff03",
        "miss": "#d500f9",
        "split experts": "#00b0ff",
    }
    view = look.view
    wins = "labels win" if view.labels_win else "labels do not win"
    calibrated = ", calibrated" if view.temperatures else ""
    title = f"{case.name} ({case.split}): margin {view.margin:g}, {wins}{calibrated}"
    save_planes(
        path, found.image, panels, case.grid.spacing_mm,
        colours=colours, legend=_legend(numbers, colours, disagreement),
        title=[title, *(f"improbable: {flag}" for flag in numbers.flags)],
    )  # fmt: skip


def _legend(
    numbers: CaseNumbers, colours: Mapping[str, str], shown: Mapping[str, object]
) -> dict[str, str]:
    """Name -> what the legend says of it."""
    organs = numbers.organs
    false = sum(n.false_positive_ml or 0.0 for n in organs.values())
    missed = sum(n.missed_ml or 0.0 for n in organs.values())
    split = sum(n.split_ml or 0.0 for n in organs.values())
    words = {name: f"{name} {organ.region_ml:.0f} ml" for name, organ in organs.items()} | {
        "agreed background": f"agreed background {numbers.agreed_background:.1%}",
        "conflict": f"conflict {numbers.conflict_ml:.1f} ml",
        "abstained": f"abstained {numbers.abstained_ml:.1f} ml",
        "false positive": f"teacher says organ, label says not: {false:.1f} ml",
        "miss": f"label says organ, its teacher does not: {missed:.1f} ml",
        "split experts": f"experts of one organ differ: {split:.1f} ml",
    }
    return {n: words[n] for n in colours if n in words and (n != "split experts" or n in shown)}
