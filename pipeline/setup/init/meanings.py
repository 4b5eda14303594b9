"""What label values and output channels mean: as files name them, as the user says, what is open.

A name in a file is taken for an organ only if the user uses that organ by that name. Everything
else has to be said: whether a tumour belongs to its organ is for a person to decide.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.data.labels import same_name
from pipeline.errors import ConfigError

Ask = Callable[[str], str]

BACKGROUND, IGNORE, REST = "background", "ignore", "rest"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_NUMBERS = re.compile(r"\d+(\+\d+)*")
_PARTS = re.compile(r"[A-Za-z0-9][\w.-]*=[^,:=]+(,[A-Za-z0-9][\w.-]*=[^,:=]+)*")


@dataclass(frozen=True)
class Named:
    """A name that a file gives to label values, or to output channels."""

    name: str
    values: tuple[int, ...]


@dataclass(frozen=True)
class Meanings:
    """Organ -> values; values that are no organ here; values that mean unknown."""

    organs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    background: tuple[int, ...] = ()
    ignore: tuple[int, ...] = ()
    rest_is_background: bool = False

    @property
    def values(self) -> set[int]:
        """All values that have a meaning."""
        return {v for part in self.organs.values() for v in part} | {*self.background, *self.ignore}


@dataclass(frozen=True)
class Flag:
    """`NAME=PATH:KEY=VALUE,KEY=VALUE` in its parts; without `NAME=` the path's own name is used."""

    name: str
    path: str
    parts: Mapping[str, str]


def parse_flag(text: str) -> Flag:
    """Splits the value of `--dataset` or `--teacher`.

    Raises:
        ConfigError: no path, or a name that no registry takes.
    """
    rest, parts = text, ""
    before, colon, after = text.rpartition(":")
    if colon and _PARTS.fullmatch(after):
        rest, parts = before, after
    name, equals, path = rest.partition("=")
    if not equals or not _NAME.fullmatch(name):
        stem = rest.rstrip("/").rpartition("/")[2].partition(".")[0]
        name, path = re.sub(r"[^A-Za-z0-9_.-]", "-", stem).lstrip("-_."), rest
    if not path or not name:
        raise ConfigError(
            "neither a path nor NAME=PATH.",
            where=repr(text),
            fix="Write NAME=PATH or NAME=PATH:liver=1,background=2+3.",
        )
    return Flag(name, path, _parts_of(parts, text))


def parse_meanings(parts: Mapping[str, str], *, where: str) -> Meanings:
    """`{"liver": "1+2", "background": "rest"}` -> meanings.

    Raises:
        ConfigError: no numbers, or a number with two meanings.
    """
    organs: dict[str, tuple[int, ...]] = {}
    owner: dict[int, str] = {}
    for name, text in parts.items():
        if name == BACKGROUND and text == REST:
            continue
        if not _NUMBERS.fullmatch(text):
            raise ConfigError(
                f"{name}={text} names no numbers.",
                where=where,
                fix="Write liver=1, or liver=1+2 for several; background=rest for all others.",
            )
        organs[name] = tuple(int(number) for number in text.split("+"))
        for value in organs[name]:
            if owner.setdefault(value, name) != name:
                what = f"{value} is both {owner[value]} and {name}."
                raise ConfigError(what, where=where, fix="A value has one meaning.")
    background, ignore = organs.pop(BACKGROUND, ()), organs.pop(IGNORE, ())
    return Meanings(organs, background, ignore, parts.get(BACKGROUND) == REST)


def parse_answer(text: str, *, where: str) -> Meanings:
    """`liver=1+2,background=3` as typed -> meanings; see `parse_meanings`."""
    return parse_meanings(_parts_of(text.replace(" ", ""), where), where=where)


def settle(
    names: Sequence[Named], said: Meanings, organs: Collection[str], *, what: str, where: str
) -> tuple[Meanings, dict[int, str]]:
    """Puts together what files name and what the user said.

    Args:
        names: of the file, without background; empty: it names nothing.
        said: by the user; it goes before the file's names.
        what: `label value` or `channel`, for errors.

    Returns:
        the meanings, and the values that have none yet with the file's names for them.

    Raises:
        ConfigError: the user's words contradict the file's.
    """
    called: dict[int, str] = {}
    for named in names:
        for value in named.values:
            called[value] = f"{called[value]}, {named.name}" if value in called else named.name
    if names:
        _refuse_contradictions(names, called, said, organs, what=what, where=where)
    taken = said.values
    found = dict(said.organs)
    for organ in organs:
        same = {v for n in names if same_name(n.name, organ) for v in n.values}
        if same and organ not in found and not same & taken:
            found[organ] = tuple(sorted(same))
    known = {value for values in found.values() for value in values} | taken
    left = {value: name for value, name in sorted(called.items()) if value not in known}
    background = said.background
    if said.rest_is_background:
        background, left = (*background, *left), {}
    return Meanings(found, background, said.ignore), left


def ask_for_each(
    meanings: Meanings, left: Mapping[int, str], organs: Sequence[str], *, what: str, ask: Ask
) -> Meanings:
    """Asks for every value that has no meaning yet, until the answer is one of the choices."""
    found = {organ: list(values) for organ, values in meanings.organs.items()}
    others = {BACKGROUND: list(meanings.background), IGNORE: list(meanings.ignore)}
    choices = [*organs, BACKGROUND, *([IGNORE] if what == "label value" else [])]
    for value, name in left.items():
        answer = ""
        while answer not in choices:
            answer = ask(f"{what} {value} is called {name!r}: {' | '.join(choices)}").strip()
        (others if answer in others else found).setdefault(answer, []).append(value)
    return Meanings(
        {organ: tuple(values) for organ, values in found.items()},
        tuple(others[BACKGROUND]),
        tuple(others[IGNORE]),
    )


def open_question(
    meanings: Meanings, left: Mapping[int, str], organs: Sequence[str], *, what: str
) -> str:
    """What has to be said of the values without a meaning, in words for the user."""
    listed = ", ".join(f"{value} ({name})" for value, name in left.items())
    name = next(iter(left.values()))
    # A region and those inside it, as kidney, tumour and cyst, are one organ to most.
    alike = tuple(value for value, names in left.items() if name in names.split(", "))
    choices = [f"{o}={in_flag((*meanings.organs.get(o, ()), *alike))}" for o in organs[:3]]
    choices += [f"{BACKGROUND}={in_flag(alike)}"]
    choices += [f"{IGNORE}={in_flag(alike)}"] if what == "label value" else []
    return (
        f"it is not said what {what} {listed} means. Add to the flag, for example, "
        f"{' or '.join(choices)}; {BACKGROUND}={REST} says that none of the others is an organ."
    )


def _refuse_contradictions(
    names: Sequence[Named],
    called: Mapping[int, str],
    said: Meanings,
    organs: Collection[str],
    *,
    what: str,
    where: str,
) -> None:
    wrong = [f"there is no {what} {v}" for v in sorted(said.values - set(called))]
    for organ, values in said.organs.items():
        own = {v for n in names if same_name(n.name, organ) for v in n.values}
        if not own <= set(values):
            wrong.append(f"{organ} is {what} {in_flag(own)}, not {in_flag(values)}")
        for other in organs:
            theirs = {v for n in names if same_name(n.name, other) for v in n.values}
            if other != organ and theirs & set(values) - own:
                wrong.append(f"{what} {in_flag(theirs & set(values))} is {other}, not {organ}")
    if wrong:
        table = ", ".join(f"{value} is {name}" for value, name in sorted(called.items()))
        raise ConfigError(
            f"what was said contradicts the file: {'; '.join(wrong)}.",
            where=where,
            fix=f"Correct the flag, or the path. There: {table}.",
        )


def in_flag(values: Collection[int]) -> str:
    """`1+2`, as a flag has it."""
    return "+".join(str(value) for value in sorted(values))


def _parts_of(text: str, where: str) -> dict[str, str]:
    if not text:
        return {}
    if not _PARTS.fullmatch(text):
        raise ConfigError(
            f"{text!r} says nothing that can be read.", where=where,
            fix="Write liver=1+2,background=3.",
        )  # fmt: skip
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    repeated = {name for name, _ in pairs if sum(n == name for n, _ in pairs) > 1}
    if repeated:
        raise ConfigError(
            f"{', '.join(sorted(repeated))} is said twice.",
            where=where,
            fix="Join several numbers by +, as in liver=1+2.",
        )
    return dict(pairs)
