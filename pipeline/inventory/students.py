"""Which student was trained from which units, as its run recorded it. Nothing is loaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.cache.places import Place
from pipeline.config import short
from pipeline.folder import Folder, matching, read_text


@dataclass(frozen=True)
class StudentRun:
    """A run in `students/`.

    Attributes:
        run: its name.
        finished: whether all its steps were made.
        teachers: teacher -> digest.
        cases: `dataset/case` -> digest, of training and validation.
    """

    run: str
    finished: bool
    teachers: Mapping[str, str]
    cases: Mapping[str, str]

    def used(self, place: Place) -> bool:
        """Whether it was trained on a unit."""
        if place.teacher is None:
            return short(self.cases.get(place.case_name, "")) == place.tag
        teacher = short(self.teachers.get(place.teacher, ""))
        return teacher == place.teacher_tag and place.case_name in self.cases


def student_runs(work: Folder) -> Sequence[StudentRun]:
    """The runs of a work folder, by name; one whose record cannot be read has used nothing."""
    runs = []
    for name, folder in run_folders(work).items():
        try:
            inputs = json.loads(read_text(folder / "config.json"))["inputs"]
            teachers = dict(inputs.get("teachers", {}))
            cases = {**inputs.get("cases", {}), **inputs.get("validation", {})}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            teachers, cases = {}, {}
        finished = (folder / "finished.json").exists()
        runs.append(StudentRun(name, finished, teachers, cases))
    return runs


def run_folders(work: Folder) -> dict[str, Folder]:
    """Name -> folder of every run; those of a comparison are `<comparison>/<run>`."""
    found: dict[str, Folder] = {}
    for folder in (p for p in matching(work / "students", "[!.]*") if p.is_dir()):
        within = [path.parent for path in matching(folder, "[!.]*/config.json")]
        if within and not (folder / "config.json").exists():
            found |= {f"{folder.name}/{run.name}": run for run in within}
        else:
            found[folder.name] = folder
    return found


def used_by(place: Place, runs: Sequence[StudentRun]) -> list[str]:
    """Names of the runs that were trained on a unit."""
    return [run.run for run in runs if run.used(place)]


def in_few_words(runs: Iterable[str]) -> str:
    """Names of runs for a column of a table; those of one comparison are counted."""
    groups, said = Counter[str](), []
    for name in runs:
        group, _, within = name.partition("/")
        if within:
            groups[group] += 1
        else:
            said.append(name)
    said += [f"{group} ({n} run{'s' if n > 1 else ''})" for group, n in groups.items()]
    return ", ".join(sorted(said)) or "–"
