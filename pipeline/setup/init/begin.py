"""`pipeline init`: from folders to a registry that loads. What is unknown is asked or refused."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations, count
from pathlib import Path

from pipeline.data.entries import NnunetOptions, check_pattern
from pipeline.data.labels import same_name
from pipeline.data.nifti import read_geometry
from pipeline.data.registry import Registry, load_registry
from pipeline.data.volume import Grid, Orientation, Spacing
from pipeline.errors import ConfigError, GeometryError, RegistryError, WorkFolderError
from pipeline.folder import contains, refuse_foreign, temporary_name
from pipeline.setup.init import meanings
from pipeline.setup.init.datasets import FoundDataset, look_at_dataset
from pipeline.setup.init.meanings import BACKGROUND, IGNORE, Ask, Flag
from pipeline.setup.init.teachers import FoundTeacher, look_at_teacher, settings_of
from pipeline.setup.init.text import DatasetPart, TeacherPart, registry_text
from pipeline.setup.topology import propose_grid

_OTHERWISE_MM = (3.0, 1.5, 1.5)  # where no header can be read, or slices and volumes are mixed


@dataclass(frozen=True)
class InitRequest:
    """What the user said.

    Attributes:
        datasets, teachers: values of the flags, `NAME=PATH:liver=1`.
        files: `NAME=IMAGES,LABELS`.
        organs: `NAME` or `NAME=ID`.
        spacing_mm: of the student grid, z, y, x; None: what fits the files.
    """

    datasets: Sequence[str]
    teachers: Sequence[str] = ()
    files: Sequence[str] = ()
    organs: Sequence[str] = ()
    spacing_mm: Spacing | None = None


def begin(
    path: Path, request: InitRequest, *, force: bool = False, ask: Ask | None = None
) -> Registry:
    """Looks at folders, and writes a registry that has been loaded once: what cannot be loaded is
    not left behind. Args and errors: as of `draft`.

    Raises:
        WorkFolderError: the registry cannot be written.
    """
    text = draft(path, request, force=force, ask=ask)
    temporary = path.with_name(temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        load_registry(temporary)
        temporary.replace(path)
    except RegistryError as error:
        raise RegistryError(str(error).replace(str(temporary), str(path))) from error
    except OSError as error:
        raise WorkFolderError(
            f"cannot be written ({error}).", where=path, fix="Name another file with -r."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return load_registry(path, files=False)


def draft(path: Path, request: InitRequest, *, force: bool = False, ask: Ask | None = None) -> str:
    """Looks at folders: the text of the registry that `begin` writes. Nothing is written.

    Args:
        ask: puts a question to the user; None: what is not known is refused, all at once.

    Raises:
        ConfigError: something is not known, or contradicts the files; a file there is no registry.
        RegistryError, TeacherError: folders that cannot be used, or a registry that exists.
    """
    ours = all(contains(path, key) for key in ("schema_version", "organs", "datasets"))
    refuse_foreign("init", [(path, ours)], fix="Name another file with -r.")
    if path.exists() and not force:
        raise RegistryError(
            "there is a registry already.",
            where=path,
            fix="Name another file with -r, or replace it with --force.",
        )
    datasets = _named(request.datasets, "--dataset")
    teachers = _named(request.teachers, "--teacher")
    if not datasets:
        raise ConfigError(
            "no dataset is named.",
            where="--dataset",
            fix="Give --dataset NAME=FOLDER, once for each dataset.",
        )
    patterns = _patterns(request.files, datasets)
    found = {n: look_at_dataset(_expand(f.path), patterns.get(n)) for n, f in datasets.items()}
    networks = {name: look_at_teacher(_expand(flag.path)) for name, flag in teachers.items()}
    organs = name_organs(request.organs, [*datasets.values(), *teachers.values()])
    if not organs:
        organs = ask_organs([*found.values(), *networks.values()], ask)
    problems: list[str] = []
    base = path.parent
    dataset_parts = [
        DatasetPart(name, _root(flag.path, base), found[name],
                    _of_dataset(flag, found[name], list(organs), ask, problems))
        for name, flag in datasets.items()
    ]  # fmt: skip
    teacher_parts = [
        _of_teacher(flag, networks[name], list(organs), base, ask, problems)
        for name, flag in teachers.items()
    ]
    if problems:
        whole = "".join(f"\n  {problem}" for problem in problems)
        several = f"{len(problems)} things are not known:{whole}"
        raise ConfigError(problems[0] if len(problems) == 1 else several)
    headers = {name: _headers(dataset) for name, dataset in found.items()}
    spacing_mm, notes = _grid(headers, request.spacing_mm)
    orders: dict[str, set[str]] = {}
    for name, dataset in found.items():
        orders.setdefault(dataset.root.name, set()).update(kept.code for _, kept in headers[name])
    return registry_text(
        organs, spacing_mm, notes, dataset_parts, _in_their_order(teacher_parts, orders)
    )


def _of_dataset(
    flag: Flag, found: FoundDataset, organs: Sequence[str], ask: Ask | None, problems: list[str]
) -> meanings.Meanings:
    where = f"--dataset {flag.name}"
    said = meanings.parse_meanings(flag.parts, where=where)
    if not found.names and said.rest_is_background:
        problems.append(
            f"{where}: nothing names its label values, so that {BACKGROUND}=rest means none. "
            f"List them: {BACKGROUND}=2+3."
        )
    return _settled(found.names, said, organs, ask, "label value", where, problems)


def _of_teacher(
    flag: Flag, found: FoundTeacher, organs: Sequence[str], base: Path, ask: Ask | None,
    problems: list[str],
) -> TeacherPart:  # fmt: skip
    where = f"--teacher {flag.name}"
    parts = dict(flag.parts)
    settings, unknown = settings_of(found, parts, ask=ask, where=where)
    problems += unknown
    said = meanings.parse_meanings(parts, where=where)
    if said.ignore:
        raise ConfigError(
            f"{IGNORE} is for label values.", where=where, fix=f"Say {BACKGROUND} of channels."
        )
    known = _settled(found.names, said, organs, ask, "channel", where, problems).organs
    return TeacherPart(flag.name, _as_written(str(found.weights), base), found, known, settings)


def _settled(
    names: Sequence[meanings.Named], said: meanings.Meanings, organs: Sequence[str],
    ask: Ask | None, what: str, where: str, problems: list[str],
) -> meanings.Meanings:  # fmt: skip
    """What the values mean; what nobody has said of them is added to `problems`."""
    plural, name = {"channel": "output channels"}.get(what, f"{what}s"), where.split()[1]
    if not names and not said.organs:
        if ask is None:
            example = f"{organs[0]}=1" + (f",{BACKGROUND}=2+3" if what == "label value" else "")
            problems.append(
                f"{where}: nothing names its {plural}. Add to the flag, for example, :{example}."
            )
            return said
        said = ask_meanings(f"{name}: {plural} by organ", organs, ask, where)
    found, left = meanings.settle(names, said, organs, what=what, where=where)
    if left and ask is not None:
        named = lambda question: ask(f"{name}: {question}")  # noqa: E731
        found, left = meanings.ask_for_each(found, left, organs, what=what, ask=named), {}
    if left:
        problems.append(f"{where}: {meanings.open_question(found, left, organs, what=what)}")
    elif not found.organs:
        problems.append(f"{where}: it has none of the organs ({', '.join(organs)}).")
    return found


def _named(flags: Sequence[str], option: str) -> dict[str, Flag]:
    found: dict[str, Flag] = {}
    for flag in map(meanings.parse_flag, flags):
        if flag.name in found:
            raise ConfigError(
                f"{flag.name} is given twice.", where=option, fix="Give each another NAME=."
            )
        found[flag.name] = flag
    return found


def _patterns(files: Sequence[str], datasets: Mapping[str, Flag]) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for text in files:
        name, _, patterns = text.partition("=")
        images, comma, labels = patterns.partition(",")
        if name not in datasets or not comma:
            raise ConfigError(
                f"{text!r} names no dataset and its two patterns.",
                where="--files",
                fix=f"Write NAME=IMAGES,LABELS; datasets: {', '.join(datasets)}.",
            )
        try:
            check_pattern(images)
            check_pattern(labels)
        except ValueError as error:
            fix = "For example 'NAME=ct/{case}.nii.gz,seg/{case}.nii.gz'."
            raise ConfigError(f"{error}.", where=f"--files {name}", fix=fix) from error
        found[name] = images, labels
    return found


def _headers(dataset: FoundDataset) -> list[tuple[Grid, Orientation]]:
    """Of its images; those that cannot be read are for `pipeline check` to report."""
    found = []
    for file in dataset.image_files().values():
        with suppress(GeometryError):
            found.append(read_geometry(file))
    return found


def _grid(
    headers: Mapping[str, Sequence[tuple[Grid, Orientation]]], chosen: Spacing | None
) -> tuple[Spacing, Sequence[str]]:
    """The student grid, and what the headers say."""
    medians, grids = [], []
    for name, read in headers.items():
        own = [grid for grid, _ in read]
        if own:
            spacings = zip(*(grid.spacing_mm for grid in own), strict=True)
            median = [round(statistics.median(axis), 2) for axis in spacings]
            medians.append(f"{name} {median} ({len(own)} files)")
        grids += own
    notes = [f"Median spacing of the CTs: {', '.join(medians)}."] if medians else []
    if chosen is not None:
        return chosen, notes
    with suppress(ConfigError):
        if grids:
            proposed = propose_grid(grids)
            return proposed.spacing_mm, [*notes, f"Proposed: {proposed.why}."]
    return _OTHERWISE_MM, notes


def _in_their_order(
    teachers: Sequence[TeacherPart], orders: Mapping[str, set[str]]
) -> list[TeacherPart]:
    """nnU-Net does not reorient: where files are stored in several orders of axes, each of its
    networks is given that of the dataset that it was trained on, if that is here and has one."""
    several = len(set().union(*orders.values())) > 1
    parts = []
    for part in teachers:
        own = orders.get(part.found.trained_on, set())
        if several and len(own) == 1:
            (order,) = own
            settings = dict(part.settings)
            settings["nnunet"] = {**settings.get("nnunet", {}), "orientation": order}
            note = f"{part.found.trained_on} is stored as {order}, others here are not"
            network = replace(part.found, notes=(*part.found.notes, note))
            part = replace(part, found=network, settings=settings)
        parts.append(part)
    return parts


def _expand(path: str) -> Path:
    return Path(path).expanduser()


def _root(path: str, base: Path) -> str:
    """Of a list of cases the folder that it lies in."""
    return _as_written(str(Path(path).parent) if _expand(path).is_file() else path, base)


def _as_written(path: str, base: Path) -> str:
    """A path as the registry has it: relative to its folder, unless it was given otherwise."""
    if path.startswith("~") or Path(path).is_absolute():
        return path
    return Path(os.path.relpath(path, base)).as_posix()


def describe(registry: Registry) -> list[str]:
    """What stands in the new registry, a line each, for people."""
    lines = []
    for name, entry in registry.datasets.items():
        num_cases = len(registry.cases(name))
        lines.append(f"dataset {name}: {num_cases} cases, {', '.join(entry.annotated)}")
    for name, teacher in registry.teachers.items():
        usual = NnunetOptions()
        nnunet = teacher.nnunet or usual
        other = f" of {nnunet.checkpoint}" if nnunet.checkpoint != usual.checkpoint else ""
        other += f", axes {nnunet.orientation}" if nnunet.orientation else ""
        lines.append(f"teacher {name} ({teacher.kind}{other}): {', '.join(teacher.organs)}")
    by = " x ".join(f"{mm:g}" for mm in registry.grid.spacing_mm)
    grid = f"student grid {by} mm (z, y, x); `pipeline plan --student` proposes the rest"
    return [*lines, grid, *registry.empty_splits()]


def next_command(registry: Registry) -> str:
    """What to run now."""
    flag = "" if registry.path == Path("data_registry.yaml") else f" -r {registry.path}"
    if registry.teachers:
        return f"pipeline check{flag}"
    return f"pipeline cache-teachers{flag} --dry-run"


# Which organs there are, and questions whose answers are asked for until they can be used.

_ORGAN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]*)(=(?P<id>\d+))?")


def ask_meanings(title: str, organs: Sequence[str], ask: Ask, where: str) -> meanings.Meanings:
    """Asks what values mean where nothing names them."""
    question = f"{title}, for example {organs[0]}=1 or {organs[0]}=1+2,{BACKGROUND}=3"
    hint = ""
    while True:
        try:
            said = meanings.parse_answer(ask(f"{hint}{question}"), where=where)
        except ConfigError as error:
            hint = f"{error} "
            continue
        strange = [organ for organ in said.organs if organ not in organs]
        if said.organs and not strange:
            return said
        hint = f"{', '.join(strange)} is none of the organs ({', '.join(organs)}). "


def ask_organs(found: Sequence[FoundDataset | FoundTeacher], ask: Ask | None) -> dict[str, int]:
    """Asks which organs the student is to know; without anybody to ask, that is an error."""
    names = list(dict.fromkeys(named.name for part in found for named in part.names))
    listed = f" Names in the files: {', '.join(names)}." if names else ""
    if ask is None:
        raise ConfigError(
            f"it is not said which organs the student is to know.{listed}",
            where="--organ",
            fix="Give --organ NAME once for each, or say them in a flag, "
            "as in --dataset NAME=FOLDER:liver=1.",
        )
    while True:
        answer = ask(f"organs that the student is to know, with commas.{listed}")
        with suppress(ConfigError):
            organs = name_organs([o.strip().replace(" ", "_") for o in answer.split(",")], [])
            if organs:
                return organs


def name_organs(given: Sequence[str], flags: Sequence[Flag]) -> dict[str, int]:
    """Organ -> id, from `--organ` and from what flags say of values.

    In the order they are named in; ids that are not given are the next free.

    Raises:
        ConfigError: no name, or one organ in two spellings.
    """
    wanted: dict[str, int | None] = {}
    for text in given:
        match = _ORGAN.fullmatch(text)
        if match is None or match["name"] in (BACKGROUND, IGNORE):
            raise ConfigError(
                f"{text!r} is no organ.", where="--organ", fix="Write NAME or NAME=ID, liver=1."
            )
        wanted[match["name"]] = int(match["id"]) if match["id"] else None
    for flag in flags:
        for name, value in flag.parts.items():
            if re.fullmatch(r"\d+(\+\d+)*", value) and name not in (BACKGROUND, IGNORE):
                wanted.setdefault(name, None)
    for twin, name in combinations(wanted, 2):
        if same_name(twin, name):
            raise ConfigError(
                f"{twin} and {name} are one name.", where="--organ", fix="Spell it one way."
            )
    free = (number for number in count(1) if number not in wanted.values())
    return {name: next(free) if number is None else number for name, number in wanted.items()}
