"""Configuration: frozen models from YAML, every mistake at once and each with its line; digests,
and the versions that numbers come from.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from pipeline.errors import ConfigError, PipelineError, counted, kind_of, listed
from pipeline.folder import Folder, is_local, read_bytes

Location = tuple[str | int, ...]

_APART = 3  # mistakes alike that are told one by one
# pydantic's kinds of mistakes in the words of a user; others keep its own text.
_WHOLE, _MAPPING = "must be a whole number", "must be a mapping (name: value)"
_PLAIN = {
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be a text",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": _MAPPING,
    "mapping_type": _MAPPING,
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
}
_TEXT = "tag:yaml.org,2002:str"
_KINDS = {bool: "truth values", int: "numbers", float: "numbers", date: "dates", datetime: "dates"}
_SHOWN = 3
_NAME = (
    "may have letters, digits, dots, dashes and underscores, and begins with one of the first two"
)
_PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9_.-]*$": _NAME,
    r"^[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?$": f"{_NAME}; one slash is allowed",
    r"^[\w.]+:\w+$": "must be module:function",
    r"^[\w.-]+\.pth$": "must be the name of a file that ends in .pth",
}


class Config(BaseModel):
    """Base of every configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    # Settings of earlier versions -> what to write instead.
    gone: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _nothing_gone(cls, values: Any) -> Any:
        found = [key for key in cls.gone if isinstance(values, Mapping) and key in values]
        if found:
            fixes = dict.fromkeys(cls.gone[key] for key in found)
            raise ValueError(f"no longer there: {', '.join(found)}; {'; '.join(fixes)}")
        return values


ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True)
class Problem:
    """One mistake: where in the YAML, what is wrong, what to do."""

    location: Location
    what: str
    fix: str = ""


@dataclass(frozen=True)
class Document:
    """A parsed YAML file that remembers on which line each value stands.

    Attributes:
        unquoted: how values are spelt that YAML does not read as text: 8 may be 0010. Those of
            keys end in "[key]", as pydantic has it.
    """

    path: Path
    data: Any
    lines: Mapping[Location, int]
    problems: tuple[Problem, ...] = field(default=())
    unquoted: Mapping[Location, str] = field(default_factory=dict)

    def line_of(self, location: Sequence[str | int]) -> int:
        """The line of a value, or of its nearest parent that is in the file (first line: 1)."""
        return self.lines.get(self.place_of(location), 1)

    def place_of(self, location: Sequence[str | int]) -> Location:
        """A location as far as it is in the file.

        Parts that are not in it are passed over: missing keys, and what pydantic adds to name a
        member of a union.
        """
        here: Location = ()
        for part in location:
            for there in ((*here, part), (*here, str(part))):
                if there in self.lines:
                    here = there
                    break
        return here


def read_yaml(path: Path, *, error: type[PipelineError] = ConfigError) -> Document:
    """Parses a YAML file with plain data only (no tags that run code).

    Raises:
        PipelineError: of the kind `error`; the file is absent or not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"cannot be read ({problem}).", where=path, fix="Check the path.") from problem
    lines: dict[Location, int] = {}
    problems: list[Problem] = []
    unquoted: dict[Location, str] = {}
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
        if root is not None:
            _walk(root, (), lines, problems, unquoted)
    except RecursionError as problem:
        raise error(
            "a value contains itself (&, *).", where=path, fix="Write the values out instead."
        ) from problem
    # ValueError: what looks like a date and is none, such as 2020-99-99.
    except (yaml.YAMLError, ValueError) as problem:
        mark = getattr(problem, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        what = getattr(problem, "problem", None) or str(problem)
        raise error(
            f"not valid YAML: {what}.",
            where=f"{path}{line}",
            fix="Check indentation, quotes and colons on that line.",
        ) from problem
    return Document(path, {} if data is None else data, lines, tuple(problems), unquoted)


def read_json(path: Path, error: type[PipelineError]) -> dict[str, Any]:
    """The object in a JSON file that another program wrote.

    Raises:
        PipelineError: of the kind `error`; the file is absent, not JSON, or holds something else.
    """
    fix = "Correct it, or copy it again with all that belongs to it."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise error(f"there is no {path.name}.", where=path.parent, fix=fix) from problem
    except (OSError, ValueError) as problem:
        raise error(f"not a readable JSON file ({problem}).", where=path, fix=fix) from problem
    if not isinstance(content, dict):
        raise error("not a JSON object.", where=path, fix=fix)
    return content


def load_config(
    path: Path, model: type[ConfigT], *, error: type[PipelineError] = ConfigError
) -> ConfigT:
    """Reads and validates a YAML file; every field may be left out where the model has defaults.

    Raises:
        PipelineError: of the kind `error`, naming file, line and remedy of every mistake.
    """
    return validate(read_yaml(path, error=error), model, error=error)


def validate(
    document: Document, model: type[ConfigT], *, error: type[PipelineError] = ConfigError
) -> ConfigT:
    """Validates a parsed document against a model; see `load_config`."""
    problems = list(document.problems)
    config: ConfigT | None = None
    try:
        config = model.model_validate(document.data)
    except ValidationError as failure:
        problems += schema_problems(failure, model, document)
    raise_problems(document, problems, error=error)
    assert config is not None
    return config


def raise_problems(
    document: Document, problems: Iterable[Problem], *, error: type[PipelineError] = ConfigError
) -> None:
    """Raises one error that lists all problems in the order of the file; none: returns."""
    listed = sorted(problems, key=lambda p: document.line_of(p.location))
    if not listed:
        return
    alike: dict[object, list[Problem]] = {}
    for p in listed:
        alike.setdefault(_alike(p), []).append(p)
    texts = []
    for group in alike.values():
        many = len(group) > _APART
        for p in group[:1] if many else group:
            place = f"{document.path}:{document.line_of(p.location)}: "
            place += f"{'.'.join(map(str, p.location))}: " if p.location else ""
            more = f" And {len(group) - 1} more like it." if many else ""
            texts.append(f"{place}{f'{p.what} {p.fix}'.rstrip()}{more}")
    if len(listed) == 1:
        raise error(texts[0])
    raise error(f"{len(listed)} mistakes:\n" + "\n".join(f"  {text}" for text in texts))


def schema_problems(
    failure: ValidationError, model: type[BaseModel], document: Document
) -> list[Problem]:
    """pydantic's findings in the words of a user."""
    found: list[Problem] = []
    unquoted: dict[tuple[Location, str], list[tuple[Location, str]]] = {}
    for item in failure.errors():
        *parent, last = item["loc"] or ("",)
        place, kind = document.place_of(item["loc"]), _KINDS.get(type(item["input"]))
        spelt = document.unquoted.get((*place, "[key]") if last == "[key]" else place)
        if item["type"] != "string_type" or spelt is None or kind is None:
            found.append(_problem(dict(item), model))
            continue
        place = (*place[:-1], spelt) if last == "[key]" else place
        group = tuple(parent) if isinstance(last, int) else place  # a list has one line
        unquoted.setdefault((group, kind), []).append((place, spelt))
    return found + [_in_quotes(kind, those) for (_, kind), those in unquoted.items()]


def _in_quotes(kind: str, those: Sequence[tuple[Location, str]]) -> Problem:
    spellings = [spelt for _, spelt in those[:_SHOWN]]
    quoted = f"write {', '.join(repr(spelt) for spelt in spellings)} in quotes."
    place = those[0][0]
    if len(those) == 1:
        what, kind = f"must be a text, not {spellings[0]}.", kind.removesuffix("s")
        return Problem(place, what, f"YAML reads it as a {kind}: {quoted}")
    what = f"must be texts, not {listed([spelt for _, spelt in those], _SHOWN)}."
    return Problem(place[:-1], what, f"YAML reads them as {kind}: {quoted}")


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN; the input of every digest."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 over `canonical_json`, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def short(full: str) -> str:
    """The 16 digits of a digest that appear in folder names."""
    return full[:16]


def file_sha256(path: Folder) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    if not is_local(path):
        return hashlib.sha256(read_bytes(path)).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_if_there(path: Folder) -> str | None:
    """None for a file that is not there, or cannot be read."""
    try:
        return file_sha256(path)
    except OSError:
        return None


@dataclass(frozen=True)
class FileStamp:
    """What a file was when it was hashed: whoever finds the same size and time at the same place
    need not hash it again."""

    sha256: str
    size: int
    mtime_ns: int


def stamp_file(path: Path, known: FileStamp | None = None) -> FileStamp:
    """Hashes a file, unless it is as `known` says.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    # Before it is read: of a file that is written meanwhile the stamp must not hold later.
    status = path.stat()
    if known is not None and (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns):
        return known
    return FileStamp(file_sha256(path), status.st_size, status.st_mtime_ns)


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, type(None))):  # most of what there is, told apart fastest
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        # 1.0 and 1 in a YAML file mean the same setting and must not give two digests.
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json"))
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(v) for v in value)
    if isinstance(value, Path):
        return value.as_posix()
    return value


def _walk(
    node: yaml.Node,
    here: Location,
    lines: dict[Location, int],
    problems: list[Problem],
    unquoted: dict[Location, str],
) -> None:
    lines.setdefault(here, node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode) and node.tag != _TEXT:
        unquoted[here] = node.value
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value_node in node.value:
            key = str(key_node.value)
            there = (*here, key)
            lines[there] = key_node.start_mark.line + 1
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != _TEXT:
                value = yaml.SafeLoader("").construct_object(key_node)
                there = (*here, value if isinstance(value, int) else repr(value))  # as pydantic
                lines[there] = lines[*here, key]
                unquoted[*there, "[key]"] = key
            if key in seen:
                problems.append(Problem(there, "written twice.", "Keep one of the two."))
            seen.add(key)
            _walk(value_node, there, lines, problems, unquoted)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*here, index), lines, problems, unquoted)


def _problem(item: dict[str, Any], model: type[BaseModel]) -> Problem:
    location: Location = tuple(item["loc"])
    kind, message = item["type"], str(item["msg"])
    if kind == "extra_forbidden":
        known = ", ".join(sorted(model.model_fields)) if len(location) == 1 else ""
        fix = f"Known here: {known}." if known else "Remove it, or check its spelling."
        return Problem(location, "unknown key.", fix)
    if kind == "missing":
        return Problem(location, "required, but missing.", "Add it.")
    if kind == "value_error":
        text = message.removeprefix("Value error, ")
        return Problem(location, _lowered(text).rstrip(".") + ".")
    text = _PLAIN.get(kind) or message
    if kind == "string_pattern_mismatch":
        text = _PATTERNS.get(item.get("ctx", {}).get("pattern", ""), message)
    if kind in ("too_long", "too_short"):
        least, most = (item["ctx"].get(f"{which}_length") for which in ("min", "max"))
        number = least if most is None else most
        which = "least" if most is None else "most"
        text = f"must have at {which} {counted(number, 'item')}"
    for said in ("Input should be ", "String should ", "Value should be "):
        text = text.replace(said, "must be " if said.endswith("be ") else "must ")
    return Problem(location, f"{_lowered(text)}, not {_as_written(item.get('input'))}.")


def _lowered(text: str) -> str:
    """As it stands behind a colon; names in capitals stay."""
    return text[0].lower() + text[1:] if text[:2].istitle() else text


def _as_written(value: Any) -> str:
    """A value as YAML has it, as far as Python spells it otherwise."""
    match value:
        case None:
            return "empty"
        case bool():
            return str(value).lower()
    return repr(value)


def _alike(problem: Problem) -> object:
    """What mistakes share that are told in one line: those of the items of one list with one
    remedy, and those of cases that are written out."""
    *where, last = problem.location or ("",)
    if isinstance(last, int):
        return (*where, problem.fix or kind_of(problem.what))
    place = tuple(
        "…" if before == "pairs" else here for before, here in pairwise(["", *where, last])
    )
    return (*place, problem.what, problem.fix)


# Versions of this tool and of the packages that its numbers come from; none of them is loaded.

TOOL = "organ-distill"
PACKAGES = (
    "torch", "monai", "numpy", "scipy", "zarr", "numcodecs", "dask", "nibabel", "isal", "pydantic",
    "typer", "matplotlib", "universal-pathlib",
)  # fmt: skip
# Of extras: absent is an answer.
OPTIONAL = (
    "distributed", "dask-jobqueue", "dynamic-network-architectures", "nnunetv2", "s3fs",
    "tensorboard", "mlflow-skinny", "wandb",
)  # fmt: skip


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Package -> its version, of those that are installed."""
    found = {name: _version(name) for name in packages}
    return {name: text for name, text in found.items() if text is not None}


def versions() -> dict[str, str | None]:
    """Package -> its version, None where it is not installed; this tool and Python come first."""
    found: dict[str, str | None] = {TOOL: _version(TOOL), "python": platform.python_version()}
    return found | {name: _version(name) for name in (*PACKAGES, *OPTIONAL)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
