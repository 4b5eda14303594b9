"""Which organs there are, and questions whose answers are asked for until they can be used."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress

from pipeline.errors import ConfigError
from pipeline.layouts.datasets import FoundDataset
from pipeline.layouts.meanings import (
    BACKGROUND,
    IGNORE,
    Ask,
    Flag,
    Meanings,
    parse_answer,
    same_name,
)
from pipeline.layouts.teachers import FoundTeacher

_ORGAN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]*)(=(?P<id>\d+))?")


def ask_meanings(title: str, organs: Sequence[str], ask: Ask, where: str) -> Meanings:
    """Asks what values mean where nothing names them."""
    question = f"{title}, for example {organs[0]}=1 or {organs[0]}=1+2,{BACKGROUND}=3"
    hint = ""
    while True:
        try:
            said = parse_answer(ask(f"{hint}{question}"), where=where)
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
    names = list(wanted)
    for index, name in enumerate(names):
        twin = next((n for n in names[:index] if same_name(n, name)), None)
        if twin:
            raise ConfigError(
                f"{twin} and {name} are one name.", where="--organ", fix="Spell it one way."
            )
    taken = {number for number in wanted.values() if number is not None}
    free = (number for number in range(1, 1000) if number not in taken)
    return {name: next(free) if number is None else number for name, number in wanted.items()}
