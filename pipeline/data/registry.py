"""`data_registry.yaml`: what exists. Organs, student grid, datasets, teachers.

Reading it reports every mistake at once, each with its line and the way out. Nothing it names is
executed by reading it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, ValidationError

from pipeline.config import Config, digest, raise_problems, read_yaml, schema_problems
from pipeline.data.dataset_entry import DatasetEntry, GridEntry, Name
from pipeline.data.files import CaseFiles
from pipeline.data.registry_checks import check_files, check_names, read_tables
from pipeline.data.split_entry import SPLITS, fitting_seed
from pipeline.errors import RegistryError, named
from pipeline.labels import MAX_ORGAN_ID, LabelSpace
from pipeline.teacher_entry import AdmissionEntry, TeacherEntry


class Registry(Config):
    """The whole registry; paths in it are relative to the file's folder."""

    schema_version: Literal[1] = Field(description="version of this schema")
    organs: dict[Name, Annotated[int, Field(ge=1, le=MAX_ORGAN_ID)]] = Field(
        min_length=1, description="organ -> id in stored labels and predicted label maps, each once"
    )
    grid: GridEntry
    datasets: dict[Name, DatasetEntry] = Field(min_length=1, description="name -> entry")
    teachers: dict[Name, TeacherEntry] = Field(
        default_factory=dict, description="name -> entry; none for supervision by labels alone"
    )
    admission: AdmissionEntry = Field(default_factory=AdmissionEntry)
    _path: Path = PrivateAttr(default=Path("data_registry.yaml"))
    # Dataset -> case -> patient, where a CSV says so.
    _patients: Mapping[str, Mapping[str, str]] = PrivateAttr(default_factory=dict)

    @property
    def path(self) -> Path:
        """The file this was read from."""
        return self._path

    @property
    def label_space(self) -> LabelSpace:
        """Organs with their ids, in the order of the student's channels."""
        return LabelSpace(self.organs)

    def resolve(self, path: str) -> Path:
        """A path as written in the registry -> a path that can be opened."""
        return self._path.parent / Path(path).expanduser()

    def cases(self, dataset: str) -> list[CaseFiles]:
        """The cases of a dataset with files and split, by name; cases in no split are left out.

        A phantom's cases follow from its spec, whether it has been generated yet or not.

        Raises:
            RegistryError: `split.group` does not say whose a case is.
        """
        pairs, _ = self.datasets[dataset].find(self._path.parent)
        with named(f"{self._path}, dataset {dataset}"):
            splits = self.datasets[dataset].split.assign(sorted(pairs), self._patients.get(dataset))
        return [
            CaseFiles(dataset, case, pair.image_path, pair.label_path, splits[case])
            for case, pair in sorted(pairs.items())
            if case in splits
        ]

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
