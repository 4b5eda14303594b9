"""The config of a MONAI bundle: read, reduced to what inference needs, and held against a list of
what may run.

A bundle's config is a program: `$` begins a Python expression, `_target_` calls anything that can
be imported, and resolving any entry first runs every `$import`. A registry is data and must not run
code because a file that it names says so. So only the parts asked for, and what they refer to, ever
reach `monai.bundle`, and they may hold nothing but classes from a list, with plain arguments.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import TeacherError
from pipeline.teachers.bundle_trust import (
    SEPARATOR,
    children,
    join,
    lookup,
    simplified,
    unsafe_places,
)

PARTS = ("network_def", "preprocessing", "inferer")


@dataclass(frozen=True)
class Parts:
    """What inference needs of a bundle, ready to use.

    Attributes:
        network: built, without its weights.
        preprocessing: {key: path} -> {key: image, ..}.
        inferer: (image, network) -> logits.
    """

    network: nn.Module
    preprocessing: Any
    inferer: Any


def resolve_parts(
    config: Mapping[str, Any], *, folder: Path, device: torch.device, trusted: bool, where: str
) -> Parts:
    """Builds network, preprocessing and inferer.

    Args:
        config: the inference config as read, with the metadata as `_meta_`.
        folder: the bundle's.
        device: takes the place of the config's own `device`, which changes speed only.
        trusted: the user vouches for the bundle: everything is resolved as monai.bundle does.
        where: named in errors.

    Raises:
        TeacherError: a part or reference that is not there, what may not run, or what cannot be
            built.
    """
    from monai.bundle import ConfigParser

    whole = deepcopy(dict(config))
    missing = [part for part in PARTS if part not in whole]
    if missing:
        raise TeacherError(
            f"its inference config has no {' and no '.join(missing)}.",
            where=where,
            fix="Name them as the bundle specification does, or use kind `factory`.",
        )
    whole["device"] = str(device)
    inferer = whole["inferer"] if isinstance(whole["inferer"], dict) else {}
    for key in {"device", "sw_device"} & set(inferer):
        if inferer[key] not in ("cpu", "@device"):  # stitching on the CPU saves a GPU's memory
            inferer[key] = str(device)
    try:
        if trusted:
            whole["bundle_root"] = str(folder)
            parser = ConfigParser(whole)
        else:
            parser = ConfigParser(_safe(whole, where), globals=False)
        with warnings.catch_warnings():  # of MONAI's own defaults: nothing a user could act on
            warnings.simplefilter("ignore", FutureWarning)
            found = {part: parser.get_parsed_content(part) for part in PARTS}
    except TeacherError:
        raise
    except Exception as error:  # it runs constructors of all sorts
        raise TeacherError(
            f"its config cannot be resolved ({_causes(error)}).",
            where=where,
            fix="Was the bundle made for another version of MONAI, or does it need a package that "
            "is not installed?",
        ) from error
    if not isinstance(found["network_def"], nn.Module) or not callable(found["inferer"]):
        raise TeacherError(
            "network_def is no network, or inferer no inferer.",
            where=where,
            fix="Both need a `_target_` that makes one.",
        )
    return Parts(found["network_def"], found["preprocessing"], found["inferer"])


def _safe(config: dict[str, Any], where: str) -> dict[str, Any]:
    """What the parts need, with every class checked and named in full, and nothing to evaluate."""
    from monai.bundle import ConfigParser

    needed = _pruned(config, "", _reached(config, where))
    parser = ConfigParser(needed, globals=False)
    parser.resolve_macro_and_relative_ids()
    expanded = parser.get()
    simple = simplified(expanded, expanded)
    refused = list(unsafe_places(simple))
    if refused:
        raise TeacherError(
            f"its config would run code: {'; '.join(refused)}.",
            where=where,
            fix="If you have read it and trust the bundle, say so: `--trust` and the teacher's "
            "name.",
        )
    plain: dict[str, Any] = simple
    return plain


def _reached(config: Mapping[str, Any], where: str) -> set[str]:
    """The ids of the parts and of all that they refer to, directly or not."""
    from monai.bundle import ConfigParser, ReferenceResolver

    reached: set[str] = set()
    pending = list(PARTS)
    while pending:
        here = pending.pop()
        value = lookup(config, here, where)
        if any(here == done or here.startswith(done + SEPARATOR) for done in reached):
            continue
        reached.add(here)
        for place, text in _texts(value, here):
            absolute = ConfigParser.resolve_relative_ids(place, text)
            if absolute.startswith("%"):
                file, target = ConfigParser.split_path_id(absolute[1:])
                if file:
                    raise TeacherError(
                        f"{place} takes its value from another file, {file}.",
                        where=where,
                        fix="Write the value into the inference config.",
                    )
                pending.append(target)
            else:
                pending += list(ReferenceResolver.match_refs_pattern(absolute))
    return reached


def _pruned(value: Any, here: str, reached: set[str]) -> Any:
    """Only what was reached; list elements that were not are None, so that places stay."""
    if here in reached:
        return value
    inside = [name for name in reached if not here or name.startswith(here + SEPARATOR)]
    if not inside or not isinstance(value, (dict, list)):
        return None
    if isinstance(value, list):
        return [_pruned(v, join(here, k), reached) for k, v in enumerate(value)]
    kept = {k: _pruned(v, join(here, k), reached) for k, v in value.items()}
    return {k: v for k, v in kept.items() if v is not None}


def _texts(value: Any, here: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield here, value
    for key, inner in children(value):
        yield from _texts(inner, join(here, key))


def _causes(error: BaseException) -> str:
    """monai.bundle wraps what went wrong; the innermost cause says it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip()[:300]}"
