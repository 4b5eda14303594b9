"""Every case of a registry, checked in processes, and then held against each other."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from typing import Any, Final

import numpy as np

from pipeline.config import read_yaml
from pipeline.consensus.cohort import in_ml
from pipeline.consensus.gate import VOLUME_FACTOR
from pipeline.data.entries import DatasetEntry
from pipeline.data.files import closed_cases
from pipeline.data.registry import Registry, check_files
from pipeline.data.splits import SplitEntry, fitting_seed
from pipeline.data.volume import Index3
from pipeline.engine.processes import in_processes
from pipeline.errors import RegistryError, WorkerDied, listed
from pipeline.log import Log
from pipeline.setup.check.cases import (
    CaseFacts,
    Finding,
    Task,
    in_order,
    look_at,
    of_case,
    of_dataset,
)

# Cases held against each other: duplicates, patients in two splits, organs that are missing, odd
# in size, or misplaced.
#
# Sizes are compared with those of other cases only. No anatomical limits are built in: names of
# organs are the user's own, and children, cut fields of view and tumours are in real datasets.

MIN_CASES: Final = 6
# Iglewicz and Hoaglin (1993), How to Detect and Handle Outliers: 0.6745 |x - median| / MAD > 3.5.
_MAD_TO_SIGMA: Final = 0.6745
_MOST_DEVIATION: Final = 3.5
# How far off the body's middle an organ must lie, in half widths, for its side to mean anything.
_SIDED: Final = 0.15
_MOST_AIR: Final = 0.2
_SIDES: Final = {1: ("behind", "in front of"), 2: ("left of", "right of")}
_NAMED: Final = 5
# A name that may end in a count or date of visits, behind all that names the patient.
_VISIT: Final = re.compile(
    r"(?P<patient>.+?)(?:[-_. ]+|(?<=\d)(?=[a-z]))"
    r"(?:\d{1,8}|[a-h]|baseline|bl|pre|post|(?:session|ses|visit|scan|run|timepoint|time|tp|followup|"
    r"fu|study|series|exam|day|week|month|year|phase|[tvs])[-_.]?\d{0,4})",
    re.IGNORECASE,
)
# Regular expressions that may find the patient in a name, the plainest first.
_GROUPS: Final = (
    ".+", r"(.+)_", r"(\D*\d+)", r"(\D*\d+\D+\d+)", r"(.+)-", r"(.+)\.", r"([^_]+)_", r"([^-]+)-",
)  # fmt: skip
_TELLING: Final = 6  # digits, without leading zeros, by which a name does not just count cases


def compare_cases(
    facts: Sequence[CaseFacts], datasets: Mapping[str, DatasetEntry]
) -> list[Finding]:
    """All findings that need more than one case."""
    found = same_voxels(facts) + torn_patients(facts, datasets)
    for dataset, entry in datasets.items():
        own = [case for case in facts if case.dataset == dataset and case.organ_ml]
        for organ in entry.annotated:
            found += missing_organ(dataset, organ, entry.annotated[organ], own)
            found += swallowed_organ(dataset, organ, own)
    for organ in dict.fromkeys(organ for entry in datasets.values() for organ in entry.annotated):
        found += odd_volumes(organ, facts) + misplaced(organ, facts) + in_air(organ, facts)
    return found


def same_voxels(facts: Sequence[CaseFacts]) -> list[Finding]:
    """Images that are one scan, and label maps that are one although their images are not."""
    found = []
    for cases in _groups(facts, "image_key"):
        first, *others = cases
        splits = {case.split for case in cases}
        what = f"it ({first.split}) holds the same voxels as {_named(others)}"
        if len(splits) > 1 and splits - {"validation", "test"}:
            worst = "test" if "test" in splits else "validation"
            what += f": a student would be trained on a scan of its own {worst} cases."
            fix = "Put all of them into one split (by lists), or take all but one out."
            found.append(of_case("error", "duplicate", first.case, what, fix))
        else:
            fix = "Keep one, unless they carry labels of different organs on purpose."
            what += ": the scan counts more than once."
            found.append(of_case("warning", "duplicate", first.case, what, fix))
    for cases in _groups(facts, "label_key"):
        if len({case.image_key for case in cases}) > 1:
            first, *others = cases
            what = f"its label map is that of {_named(others)}, the images are not the same."
            fix = "One of the labels is in the wrong place: find out which."
            found.append(of_case("warning", "duplicate", first.case, what, fix))
    return found


def torn_patients(
    facts: Sequence[CaseFacts], datasets: Mapping[str, DatasetEntry]
) -> list[Finding]:
    """Cases in two splits whose names look like visits of one patient, or like one scan in two
    datasets. Where `group` says whose the cases are, nobody guesses."""
    split_of = {case.case: case.split for case in facts}
    names = {d: {c.case.removeprefix(f"{d}/") for c in facts if c.dataset == d} for d in datasets}
    found = []
    for pair in combinations_with_replacement(datasets, 2):
        if all(datasets[d].split.group is not None for d in pair):
            continue
        one, other = pair
        families = visits(names[one] | names[other])
        if one != other:
            same = {c: {c} for c in names[one] & names[other] if _num_digits(c) >= _TELLING}
            families = {p: f for p, f in families.items() if f & names[one] and f & names[other]}
            families = same | families
        torn = []
        for family in families.values():
            cases = [f"{d}/{c}" for d in dict.fromkeys(pair) for c in sorted(family & names[d])]
            first = {split_of[case]: case for case in reversed(cases)}
            if len(first) > 1:
                torn.append(" and ".join(f"{c} ({s})" for s, c in reversed(first.items())))
        if torn:
            more = f"; {len(torn)} patients in all" if len(torn) > 1 else ""
            what = f"names look like scans of one patient in two splits: {torn[0]}{more}."
            splits = [datasets[d].split for d in dict.fromkeys(pair)]
            where, dataset = (one, one) if one == other else (f"{one}, {other}", None)
            fix = _group_fix(splits, names[one] | names[other])
            found.append(Finding("warning", "split", where, what, fix, dataset))
    return found


def visits(names: Collection[str]) -> dict[str, set[str]]:
    """Patient -> two or more names that look like visits of theirs, if most names look so.

    Names that only count cases have one beginning: `case_000`, `case_001` are no visits, nor are
    the cases of a few organs or sites, `liver_000`, `spleen_000`.
    """
    endings = {m[0] if (m := re.search(r"[-_. ][a-zA-Z]+$", name)) else "" for name in names}
    ends = endings.pop() if len(endings) == 1 else ""
    matches = {name: _VISIT.fullmatch(name.removesuffix(ends)) for name in names}
    patients = {match["patient"] for match in matches.values() if match}
    families: dict[str, set[str]] = {}
    for name, match in matches.items():
        short = name.removesuffix(ends)
        patient = match["patient"] if match and short not in patients else short
        families.setdefault(patient, set()).add(name)
    # The patient of `case_001_2019` is not `case`, whatever a lone `case_003` looks like.
    within = {match["patient"] for p in families if (match := _VISIT.fullmatch(p))}
    many = {p: f for p, f in families.items() if len(f) > 1 and p not in within}
    num_cases = sum(map(len, many.values()))
    if 2 * num_cases < len(names) or num_cases > len(many) ** 2 or len(many) < 2:
        return {}
    return many


def _group_fix(splits: Sequence[SplitEntry], names: Collection[str]) -> str:
    """What to do, with a `group` that was tried on the names."""
    families = visits(names)
    patient = {name: p for p, family in families.items() for name in family}
    wanted = {frozenset(f) for f in families.values()} | {
        frozenset([name]) for name in names if name not in patient
    }
    for group in _GROUPS:
        keys = SplitEntry(group=group).patients(names)
        found: dict[str, set[str]] = {}
        for name, key in keys.items():
            found.setdefault(key, set()).add(name)
        if len(keys) == len(names) and set(map(frozenset, found.values())) == wanted:
            break
    else:
        group = ""
    line = f"`group: '{group}'`" if group else "`group: {csv: .., case: .., column: ..}`"
    fix = f"If they are, add {line} to `split`"
    if group and len(splits) == 1:
        mended = splits[0].model_copy(update={"group": group})
        if mended.empty(mended.assign(names).values()):
            seed = fitting_seed(mended, [set(mended.patients(names).values())])
            fix += "" if seed is None else f", with `seed: {seed}` lest a split be empty"
    if len(splits) > 1:
        fix += " of both, and give both the same `seed` and fractions"
    if any(split.by_list for split in splits):
        fix += ", and move each patient's cases into one list"
    return f"{fix}."


def _num_digits(name: str) -> int:
    return sum(len(number.lstrip("0")) for number in re.findall(r"\d+", name))


def missing_organ(
    dataset: str, organ: str, values: Sequence[int], own: Sequence[CaseFacts]
) -> list[Finding]:
    """An organ that the dataset annotates: absent in all of its cases, or in some."""
    without = [case for case in own if not case.organ_ml.get(organ)]
    if own and len(without) == len(own):
        what = f"{organ} is empty in all {len(own)} labels that could be read."
        fix = f"Is {list(values)} really the label value of {organ} in these files?"
        return [of_dataset("error", "organ", dataset, what, fix)]
    fix = "Removed, or outside the image? If nobody annotated it there, take the case out."
    what = f"{organ} has no voxel in the label."
    return [of_case("warning", "organ", case.case, what, fix) for case in without]


def swallowed_organ(dataset: str, organ: str, own: Sequence[CaseFacts]) -> list[Finding]:
    """An organ of which the student grid leaves nothing in any case: stage one refuses that."""
    left = [case.grid_voxels[organ] for case in own if organ in case.grid_voxels]
    if not left or any(left) or not any(case.organ_ml[organ] for case in own):
        return []
    what = f"{organ} has no voxel left on the student grid in any of {len(left)} cases."
    fix = f"Choose a finer `grid.spacing_mm`, or take {organ} out of `annotated`."
    return [of_dataset("error", "small", dataset, what, fix)]


def odd_volumes(organ: str, facts: Sequence[CaseFacts]) -> list[Finding]:
    """Labels of a size far from those of the dataset's other cases, or of all where it has few."""
    everywhere = [case for case in facts if case.organ_ml.get(organ)]
    found = []
    for dataset in dict.fromkeys(case.dataset for case in everywhere):
        own = [case for case in everywhere if case.dataset == dataset]
        enough = len(own) > MIN_CASES
        against = own if enough else everywhere
        for case in own:
            others = [other.organ_ml[organ] for other in against if other is not case]
            if len(others) >= MIN_CASES and is_outlier(case.organ_ml[organ], others):
                low, middle, high = np.quantile(others, (0.05, 0.5, 0.95))
                what = (
                    f"{organ} has {in_ml(case.organ_ml[organ])} ml; {len(others)} other cases of "
                    f"{dataset if enough else 'all datasets'} have {in_ml(middle)} ml at the "
                    f"median, most {in_ml(low)} to {in_ml(high)} ml."
                )
                fix = "Look at the label: cut off, another structure, wrong spacing? Or ill."
                found.append(of_case("warning", "volume", case.case, what, fix))
    return found


def is_outlier(ml: float, others: Sequence[float]) -> bool:
    """Whether a volume is far from others: by the modified z-score of logarithms, which is robust
    against other outliers, and at least by the factor that the admission gate calls odd."""
    logs = np.log(np.asarray(others, dtype=np.float64))
    middle = float(np.median(logs))
    apart = abs(float(np.log(ml)) - middle)
    spread = float(np.median(np.abs(logs - middle)))
    return apart > np.log(VOLUME_FACTOR) and _MAD_TO_SIGMA * apart > _MOST_DEVIATION * spread


def misplaced(organ: str, facts: Sequence[CaseFacts]) -> list[Finding]:
    """Labels on the other side of the body than in most cases: a mirrored image, or its header."""
    seen = [case for case in facts if organ in case.organ_place]
    found = []
    for axis, (minus, plus) in _SIDES.items():
        places = np.array([case.organ_place[organ][axis] for case in seen])
        if len(seen) < MIN_CASES or abs(usual := float(np.median(places))) < _SIDED:
            continue
        for case, place in zip(seen, places.tolist(), strict=True):
            if place * usual < 0 and abs(place) > _SIDED:
                sides = (plus, minus) if place > 0 else (minus, plus)
                what = (
                    f"{organ} lies {sides[0]} the body's middle, and {sides[1]} it in most of "
                    f"{len(seen)} cases."
                )
                fix = "Is the image mirrored, or its affine wrong? Look at it in a viewer."
                found.append(of_case("warning", "place", case.case, what, fix))
    return found


def in_air(organ: str, facts: Sequence[CaseFacts]) -> list[Finding]:
    """Labels that lie in air although those of other cases do not: label and image do not fit."""
    seen = [case for case in facts if organ in case.organ_air]
    if len(seen) < MIN_CASES or np.median([c.organ_air[organ] for c in seen]) > _MOST_AIR / 4:
        return []
    fix = "Label and image do not fit: flipped, shifted, or of another scan?"
    rest = (
        f"of the label of {organ} lies in air; in most of {len(seen)} cases next to nothing does."
    )
    return [
        of_case("warning", "air", case.case, f"{case.organ_air[organ]:.0%} {rest}", fix)
        for case in seen
        if case.organ_air[organ] > _MOST_AIR
    ]


def _groups(facts: Sequence[CaseFacts], key: str) -> list[list[CaseFacts]]:
    by_key: dict[str, list[CaseFacts]] = {}
    for case in facts:
        if getattr(case, key) is not None:
            by_key.setdefault(getattr(case, key), []).append(case)
    return [cases for cases in by_key.values() if len(cases) > 1]


def _named(cases: Sequence[CaseFacts]) -> str:
    return listed([f"{case.case} ({case.split})" for case in cases], _NAMED)


# Every case of a registry, in processes: what its files hold, and what is wrong with them.

_MOST_JOBS = 16  # readers of one file system; more wait for it


@dataclass(frozen=True)
class DataReport:
    """What was found in datasets.

    Attributes:
        cases: facts of each case whose files are there.
    """

    datasets: Sequence[str]
    cases: Sequence[CaseFacts]
    num_cases: int
    findings: Sequence[Finding]

    def to_json(self) -> dict[str, Any]:
        """Plain values; findings are not repeated case by case."""
        cases = [asdict(case) for case in self.cases]
        return {
            "datasets": list(self.datasets),
            "num_cases": self.num_cases,
            "cases": [{k: v for k, v in case.items() if k != "findings"} for case in cases],
        }


def check_datasets(
    registry: Registry,
    *,
    patch: Index3,
    log: Log,
    dataset: str | None = None,
    jobs: int | None = None,
) -> DataReport:
    """Reads each file of each case once and compares the cases.

    Args:
        registry: read without its files; what is wrong with them is part of the report.
        jobs: processes; None for as many as there are cores, at most 16. Changes speed only.
    """
    if dataset is not None:
        registry.check_dataset(dataset)
    entries = {d: e for d, e in registry.datasets.items() if dataset in (None, d)}
    findings = _file_findings(registry, entries)
    tasks, num_cases = [], 0
    for name, entry in entries.items():
        sources = registry.cases(name)
        if empty := registry.empty_split(name):
            findings.append(of_dataset("warning", "split", name, *empty))
        num_cases += len(sources)
        if entry.phantom is not None and len(closed_cases(sources)) == len(sources) > 0:
            what = f"none of its {len(sources)} synthetic cases has been generated."
            findings.append(of_dataset("error", "file", name, what, "Run `pipeline phantom`."))
            continue
        tasks += [Task(s, entry, registry.grid.spacing_mm, patch) for s in sources]
    with log.progress("cases", len(tasks)) as advance:
        facts = look_at_all(tasks, jobs=jobs, advance=advance)
    findings += [finding for case in facts for finding in case.findings]
    findings += compare_cases(facts, entries)
    return DataReport(list(entries), facts, num_cases, in_order(findings))


def look_at_all(
    tasks: Sequence[Task], *, jobs: int | None = None, advance: Callable[[str], None]
) -> list[CaseFacts]:
    """`look_at` of each, in processes of their own unless one is enough.

    A case whose process is killed (by lack of memory, say) is reported.
    """
    number = min(jobs or min(len(os.sched_getaffinity(0)), _MOST_JOBS), len(tasks))
    found = in_processes(
        look_at, tasks, number=number if number > 1 else 0,
        name=lambda task: task.source.name, advance=advance,
    )  # fmt: skip
    facts = []
    for source, made in zip((task.source for task in tasks), found, strict=True):
        if isinstance(made, WorkerDied):
            died = of_case("error", "file", source.name, made.what, made.fix)
            made = CaseFacts(source.name, source.dataset, source.place, findings=(died,))
        if isinstance(made, Exception):
            raise made
        facts.append(made)
    return facts


def _file_findings(registry: Registry, entries: Mapping[str, Any]) -> list[Finding]:
    """What the registry's patterns and splits miss among the files."""
    found = []
    for problem in check_files(read_yaml(registry.path, error=RegistryError)):
        dataset = str(problem.location[1])
        if dataset in entries:
            found.append(of_dataset("error", "registry", dataset, problem.what, problem.fix))
    return found
