"""`data_registry.yaml`: what exists. Organs, student grid, datasets, teachers.

Reading it reports every mistake at once, each with its line and the way out. Nothing it names is
executed by reading it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError

from pipeline.config import (
    Config,
    Document,
    Problem,
    digest,
    raise_problems,
    read_yaml,
    schema_problems,
)
from pipeline.data import entries
from pipeline.data.labels import MAX_ORGAN_ID, LabelSpace
from pipeline.data.splits import (
    SPLITS,
    Place,
    SplitName,
    as_mapping,
    check_groups,
    check_splits,
    fitting_seed,
    read_tables,
    role,
    split_cases,
)
from pipeline.errors import RegistryError, named


class Registry(Config):
    """The whole registry; paths in it are relative to the file's folder."""

    schema_version: Literal[1] = Field(description="version of this schema")
    organs: dict[entries.Name, Annotated[int, Field(ge=1, le=MAX_ORGAN_ID)]] = Field(
        min_length=1, description="organ -> id in stored labels and predicted label maps, each once"
    )
    grid: entries.GridEntry
    datasets: dict[entries.Name, entries.DatasetEntry] = Field(
        min_length=1, description="name -> entry"
    )
    teachers: dict[entries.Name, entries.TeacherEntry] = Field(
        default_factory=dict, description="name -> entry; none for supervision by labels alone"
    )
    admission: entries.AdmissionEntry = Field(default_factory=entries.AdmissionEntry)
    _path: Path = PrivateAttr(default=Path("data_registry.yaml"))
    # Dataset -> case -> patient, where a CSV says so.
    _patients: Mapping[str, Mapping[str, str]] = PrivateAttr(default_factory=dict)
    _fold: int | None = PrivateAttr(default=None)

    @property
    def path(self) -> Path:
        """The file this was read from."""
        return self._path

    @property
    def fold(self) -> int | None:
        """The one that validates; None: nobody chose one, which is as the first one."""
        return self._fold

    @property
    def num_folds(self) -> int:
        """Of all datasets whose cases are in folds; 0 without any."""
        return max(entry.split.num_folds for entry in self.datasets.values())

    def on_fold(self, fold: int) -> Registry:
        """The same registry, of which this fold validates. It enters no digest of it.

        Raises:
            RegistryError: no dataset is in folds, or there are fewer.
        """
        if not self.num_folds:
            fix = "Write `split: {folds: 5}`."
            raise RegistryError("no dataset is in folds.", where=self._path, fix=fix)
        if not 0 <= fold < self.num_folds:
            raise RegistryError(
                f"there is no fold {fold}.",
                where=self._path,
                fix=f"Folds are 0 to {self.num_folds - 1}.",
            )
        chosen = self.model_copy()
        chosen._fold = fold
        return chosen

    @property
    def label_space(self) -> LabelSpace:
        """Organs with their ids, in the order of the student's channels."""
        return LabelSpace(self.organs)

    def resolve(self, path: str) -> Path:
        """A path as written in the registry -> a path that can be opened."""
        return self._path.parent / Path(path).expanduser()

    def check_dataset(self, name: str) -> None:
        """Refuses the name of a dataset that there is not.

        Raises:
            RegistryError: names those that there are.
        """
        if name not in self.datasets:
            fix = f"Datasets: {', '.join(self.datasets)}; a case is named dataset/case."
            raise RegistryError(f"there is no dataset {name!r}.", where=self._path, fix=fix)

    def cases(self, dataset: str) -> list[entries.CaseFiles]:
        """The cases of a dataset with files and split, by name; cases in no split are left out.

        A phantom's cases follow from its spec, whether it has been generated yet or not.

        Raises:
            RegistryError: `split.group` does not say whose a case is.
        """
        pairs, _ = self.datasets[dataset].find(self._path.parent)
        places = self._places(dataset, pairs)
        return [
            entries.CaseFiles(
                dataset, case, pair.image_path, pair.label_path, role(place, self._fold),
                place if isinstance(place, int) else None,
            )
            for case, pair in sorted(pairs.items())
            if (place := places.get(case)) is not None
        ]  # fmt: skip

    def splits(self, dataset: str, cases: Iterable[str]) -> dict[str, SplitName]:
        """Case -> split, of these names, or of those that a split by list names; no file is read.

        Raises:
            RegistryError: `split.group` does not say whose a case is.
        """
        places = self._places(dataset, cases)
        return {case: role(place, self._fold) for case, place in places.items()}

    def _places(self, dataset: str, cases: Iterable[str]) -> dict[str, Place]:
        with named(f"{self._path}, dataset {dataset}"):
            table = self._patients.get(dataset)
            return self.datasets[dataset].split.assign(sorted(cases), table, dataset)

    def dataset_key(self, dataset: str) -> str:
        """Digest of what this registry says that a dataset and the grid mean, wherever its files
        lie; no file is read."""
        places = {"root", "images", "labels", "pairs"}
        entry = self.datasets[dataset].model_dump(
            mode="json", exclude={"licence", "source"} | places
        )
        entry["split"] = self.datasets[dataset].split.digested(self._patients.get(dataset))
        ids = {organ: self.organs[organ] for organ in self.datasets[dataset].annotated}
        return digest({"dataset": entry, "ids": ids, "grid": self.grid})

    def empty_split(self, dataset: str, among: Collection[str] = SPLITS) -> tuple[str, str] | None:
        """What is wrong and what to do, where a fraction of the cases is to validate or test and
        none of them falls there, as may be with few; no case is moved to mend it."""
        split, cases = self.datasets[dataset].split, self.cases(dataset)
        empty = split.empty([case.split for case in cases], among)
        if not cases or not empty:
            return None
        names = [case.case for case in cases]
        patients = set(split.patients(names, self._patients.get(dataset)).values())
        seed = fitting_seed(split, [patients or names])
        tried = "" if seed is None else f" (`seed: {seed}` has some in each)"
        asked = " or ".join(f"{name} ({split.fractions[name]:g})" for name in empty)
        number = f"none of its {len(cases)} cases falls"
        what = f"{number if len(cases) > 1 else 'its one case does not fall'} into {asked}."
        return what, f"Choose another `seed`{tried} or fraction, or name the cases by lists."

    def empty_splits(self, among: Collection[str] = SPLITS) -> list[str]:
        """A line for each dataset that has an empty split."""
        found = {dataset: self.empty_split(dataset, among) for dataset in self.datasets}
        return [f"dataset {dataset}: {' '.join(told)}" for dataset, told in found.items() if told]

    def teachers_know(self) -> str:
        """What is said of teachers that were trained here, on all folds but the first; empty
        without any."""
        known = [
            name
            for name, entry in self.teachers.items()
            if entry.trained_on and self.datasets[entry.trained_on].split.num_folds
        ]
        if not known:
            return ""
        return (
            f"teachers trained on the cases of all folds but fold 0: {', '.join(known)}. Students "
            "have learnt from them, so that scores of these cases are too good, if anything."
        )

    def teacher_key(self, teacher: str) -> str:
        """Digest of what this registry says of a teacher and the grid, wherever its weights lie;
        no file is read."""
        return digest({"teacher": self.teachers[teacher].key(), "grid": self.grid})

    def trusting(self, teachers: Iterable[str]) -> Registry:
        """The same registry, with teachers that may run code of their own. It enters no digest.

        Raises:
            RegistryError: no such teacher.
        """
        trusted = dict(self.teachers)
        for name in teachers:
            if name not in trusted:
                known = ", ".join(trusted) or "none"
                raise RegistryError(
                    f"there is no teacher {name!r} to trust.",
                    where=self._path,
                    fix=f"Teachers: {known}.",
                )
            trusted[name] = trusted[name].trusting()
        return self.model_copy(update={"teachers": trusted})

    def least_dice(self, teacher: str) -> float:
        """The mean Dice below which the admission gate stops at a teacher."""
        own = self.teachers[teacher].admission.dice
        return self.admission.dice if own is None else own

    def experts(self) -> Mapping[str, tuple[str, ...]]:
        """Organ -> the teachers that are expert in it, by name."""
        return {
            organ: tuple(sorted(t for t, e in self.teachers.items() if organ in e.organs))
            for organ in self.label_space.organs
        }


def load_registry(path: Path, *, files: bool = True) -> Registry:
    """Reads and checks a registry.

    Args:
        path: the YAML file.
        files: also check that patterns match, every image has its label, and every case that a
            split names exists. Stage two passes False: it runs where the raw CTs are not.

    Raises:
        RegistryError: lists every mistake with file, line and remedy.
    """
    document = read_yaml(path, error=RegistryError)
    problems = list(document.problems)
    registry: Registry | None = None
    try:
        registry = Registry.model_validate(document.data)
    except ValidationError as failure:
        problems += schema_problems(failure, Registry, document)
    problems += check_names(document)
    if files:
        problems += check_files(document)
    raise_problems(document, problems, error=RegistryError)
    assert registry is not None
    registry._path = path
    registry._patients, _ = read_tables(document)
    return registry


# What no single field of a registry can know: names that must agree, and files that must exist.
#
# All of it works on the raw data, so that it also runs, for what can be read, when other parts of
# the file are wrong: all mistakes are told in one run.


def check_names(document: Document) -> list[Problem]:
    """Organs, label values, channels, datasets and splits that contradict each other."""
    organs, datasets, teachers = (
        as_mapping(as_mapping(document.data).get(key)) for key in ("organs", "datasets", "teachers")
    )
    problems = _check_ids(organs)
    known: set[str] = set()
    for name, entry in datasets.items():
        annotated = as_mapping(as_mapping(entry).get("annotated"))
        known |= set(annotated)
        problems += _check_values(name, as_mapping(entry), annotated)
        problems += _unknown_organs(("datasets", name, "annotated"), annotated, organs)
    problems += check_splits(document)
    for name, entry in teachers.items():
        expert = as_mapping(as_mapping(entry).get("organs"))
        known |= set(expert)
        problems += _check_channels(name, as_mapping(entry), expert)
        problems += _check_trained_on(name, as_mapping(entry), expert, datasets)
        problems += _unknown_organs(("teachers", name, "organs"), expert, organs)
    for organ in organs:
        if organ not in known:
            fix = "Remove it, or add a dataset or teacher for it."
            what = f"no dataset annotates {organ} and no teacher knows it."
            problems.append(Problem(("organs", organ), what, fix))
    return problems


def check_files(document: Document) -> list[Problem]:
    """Patterns that match nothing, images without a label, cases that do not exist, patients who
    are in two splits."""
    problems = []
    found: dict[str, list[str]] = {}
    for name, entry in as_mapping(as_mapping(document.data).get("datasets")).items():
        part = {k: v for k, v in as_mapping(entry).items() if k in entries.FilesEntry.model_fields}
        try:
            files = entries.FilesEntry.model_validate(part)
        except ValidationError:
            continue  # reported with the schema
        pairs, findings = files.find(document.path.parent)
        found[name] = sorted(pairs)
        problems += [Problem(("datasets", name), finding) for finding in findings]
        for _, where, case in split_cases(as_mapping(entry)):
            if pairs and case not in pairs:
                fix = "Correct the name, or remove it."
                here = ("datasets", name, "split", *where)
                problems.append(Problem(here, f"there is no case {case}.", fix))
    return problems + check_groups(document, found)


def _check_ids(organs: Mapping[str, Any]) -> list[Problem]:
    problems: list[Problem] = []
    owner: dict[int, str] = {}
    for organ, organ_id in organs.items():
        first = owner.setdefault(organ_id, organ) if isinstance(organ_id, int) else organ
        if first != organ:
            what = f"id {organ_id} is already used by {first}."
            problems.append(Problem(("organs", organ), what, "Give every organ its own id."))
    return problems


def _check_values(
    name: str, entry: Mapping[str, Any], annotated: Mapping[str, Any]
) -> list[Problem]:
    problems: list[Problem] = []
    owner: dict[str, str] = {}
    others = {key: entry.get(key) or [] for key in ("ignore_values", "background_values")}
    meanings = {**annotated, **others}
    for organ, values in meanings.items():
        where = ("annotated", organ) if organ in annotated else (organ,)
        for value in values if isinstance(values, list) else [values]:
            first = owner.setdefault(str(value), organ)
            if first != organ:
                what = f"label value {value} already means {first}."
                fix = "A label value has one meaning."
                problems.append(Problem(("datasets", name, *where), what, fix))
            if organ in annotated and str(value) == "0":
                what, fix = "label value 0 is background.", "Use the organ's own value."
                problems.append(Problem(("datasets", name, *where), what, fix))
    return problems


def _check_channels(
    name: str, entry: Mapping[str, Any], expert: Mapping[str, Any]
) -> list[Problem]:
    problems = []
    num_channels = entry.get("num_channels")
    for organ, channels in expert.items():
        for channel in channels if isinstance(channels, list) else [channels]:
            if not isinstance(num_channels, int) or not isinstance(channel, int):
                continue
            if channel >= num_channels:
                what = f"channel {channel} is out of range: num_channels is {num_channels}."
                fix = f"Channels count from 0 to {num_channels - 1}."
                problems.append(Problem(("teachers", name, "organs", organ), what, fix))
    return problems


def _check_trained_on(
    name: str, entry: Mapping[str, Any], expert: Mapping[str, Any], datasets: Mapping[str, Any]
) -> list[Problem]:
    trained_on = entry.get("trained_on")
    here = ("teachers", name, "trained_on")
    if not isinstance(trained_on, str) or not datasets:
        return []
    if trained_on not in datasets:
        fix = f"Datasets are: {', '.join(map(str, datasets))}."
        return [Problem(here, f"there is no dataset {trained_on!r}.", fix)]
    annotated = as_mapping(as_mapping(datasets[trained_on]).get("annotated"))
    return [
        Problem(
            here,
            f"{trained_on} does not annotate {organ}, so it cannot teach it.",
            "Choose the dataset that does.",
        )
        for organ in expert
        if organ not in annotated
    ]


def _unknown_organs(
    where: tuple[str, ...], named: Mapping[str, Any], organs: Mapping[str, Any]
) -> list[Problem]:
    fix = f"Add it to `organs`, or correct its name; organs are: {', '.join(map(str, organs))}."
    return [
        Problem((*where, organ), f"{organ} is not one of the registry's organs.", fix)
        for organ in named
        if organs and organ not in organs
    ]
