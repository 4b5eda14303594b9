"""Network, preprocessing and inferer out of a MONAI bundle's config, and what of it may run.

A config is a program: `$` begins a Python expression, `_target_` calls anything that can be
imported, and resolving any entry first runs every `$import`. A registry is data and must not run
code because a file that it names says so. So only the parts asked for, and what they refer to, ever
reach `monai.bundle`, and they may hold nothing but classes from a list, with plain arguments.
"""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc import locate
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.errors import TeacherError

PARTS = ("network_def", "preprocessing", "inferer")
SEPARATOR = "::"
_PLACES = re.compile(r"(monai\.(networks|transforms|inferers)|torch\.nn)\.[\w.]+")
_INFERERS = {"SimpleInferer", "SlidingWindowInferer", "SlidingWindowInfererAdapt"}
# Transforms whose arguments cannot name code to run; LoadImaged's can, see `_unsafe_arguments`.
_TRANSFORMS = {
    "Compose", "LoadImaged", "EnsureChannelFirstd", "EnsureTyped", "CastToTyped", "ToTensord",
    "Orientationd", "Spacingd", "Resized", "Zoomd", "Flipd", "Transposed", "CropForegroundd",
    "SpatialPadd", "BorderPadd", "DivisiblePadd", "ResizeWithPadOrCropd", "CenterSpatialCropd",
    "SpatialCropd", "ScaleIntensityd", "ScaleIntensityRanged", "ScaleIntensityRangePercentilesd",
    "ClipIntensityPercentilesd", "NormalizeIntensityd", "ThresholdIntensityd", "ShiftIntensityd",
    "GaussianSmoothd", "MedianSmoothd", "SqueezeDimd", "RepeatChanneld", "Identityd",
    "SelectItemsd", "DeleteItemsd", "CopyItemsd", "ConcatItemsd",
}  # fmt: skip
_DTYPES = {"float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64"}


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
        device: takes the place of the config's own `device`, which changes speed only.
        trusted: the user vouches for the bundle: everything is resolved as monai.bundle does.
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
            f"its config cannot be resolved ({innermost(error)}).",
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


def innermost(error: BaseException) -> str:
    """monai.bundle wraps what went wrong; the innermost cause says it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def lookup(config: Any, here: str, where: str) -> Any:
    """The entry of nested lists and mappings at `a::b::0`."""
    value = config
    for part in here.split(SEPARATOR):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise TeacherError(
                f"its config refers to @{here}, which is not there.",
                where=where,
                fix="Correct the name in the inference config.",
            ) from error
    return value


def children(value: Any) -> Sequence[tuple[Any, Any]]:
    """Keys or positions, and values; nothing for what holds nothing."""
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []


def join(here: str, key: object) -> str:
    """The name of an entry of `here`, which is empty at the top."""
    return f"{here}{SEPARATOR}{key}" if here else str(key)


def simplified(value: Any, config: Any) -> Any:
    """Expressions that only write out a value are replaced by the value; others stay."""
    if isinstance(value, dict):
        return {key: simplified(inner, config) for key, inner in value.items()}
    if isinstance(value, list):
        return [simplified(inner, config) for inner in value]
    if not isinstance(value, str) or not value.startswith("$"):
        return value
    if re.fullmatch(r"\$@[\w:]+", value):
        return value[1:]
    try:
        text = re.sub(r"@([\w:]+)", lambda m: f"_reference({m.group(1)!r})", value[1:])
        return _written_out(ast.parse(text.strip(), mode="eval").body, config)
    except (ValueError, SyntaxError, TeacherError):
        return value


def _written_out(node: ast.expr, config: Any) -> Any:
    """The value of an expression that is a literal, a choice of literals, a plain entry of the
    config, or a dtype; of anything else a ValueError."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_written_out(item, config) for item in items]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(n) | float(n))):
            return -n
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _written_out(operand, config)
        case ast.IfExp(test=test, body=body, orelse=other):
            return _written_out(body if _written_out(test, config) else other, config)
        case ast.Attribute(value=ast.Name(id="torch"), attr=name) if name in _DTYPES:
            return getattr(torch, name)
        case ast.Attribute(value=ast.Name(id="np" | "numpy"), attr=name) if name in _DTYPES:
            return getattr(np, name)
        case ast.Call(func=ast.Name(id="_reference"), args=[ast.Constant(value=str(name))]):
            found = lookup(config, name, "")
            if isinstance(found, (bool, int, float)) or (
                isinstance(found, str) and not found.startswith(("$", "@", "%"))
            ):
                return found
    raise ValueError("not a plain value")


def unsafe_places(value: Any, here: str = "") -> Iterator[str]:
    """Each place that may run code. Classes that may run get their full names, in the value itself,
    so that what was looked at is what is built."""
    if isinstance(value, str) and value.startswith(("$", "%")):
        yield f"{here}: {value}"
    if isinstance(value, dict) and "_target_" in value:
        kind = _allowed_class(value["_target_"])
        if kind is None:
            yield f"{here}: _target_ {value['_target_']}"
        else:
            value["_target_"] = f"{kind.__module__}.{kind.__qualname__}"
            yield from _unsafe_arguments(value, kind, here)
    for key, inner in children(value):
        yield from unsafe_places(inner, join(here, key))


@cache
def _locator() -> Any:
    """Where MONAI's classes are, by short name: a scan of all its modules, so one for all."""
    from monai.bundle import ComponentLocator

    return ComponentLocator()


def _allowed_class(target: object) -> type | None:
    """The class that a `_target_` names, if it is a network, one of the transforms that only
    compute, or a known inferer."""
    from monai.inferers import Inferer
    from monai.transforms import Transform

    if not isinstance(target, str):
        return None
    modules = _locator().get_component_module_name(target)
    module = modules[0] if isinstance(modules, list) else modules
    full = f"{module}.{target}" if module else target
    found = locate(full) if _PLACES.fullmatch(full) else None
    # A dotted name may also wander out of these modules, through what they import.
    if not inspect.isclass(found) or not _PLACES.fullmatch(f"{found.__module__}.{found.__name__}"):
        return None
    if issubclass(found, nn.Module):
        return found
    names = _TRANSFORMS if issubclass(found, Transform) else _INFERERS
    return found if issubclass(found, (Transform, Inferer)) and found.__name__ in names else None


def _unsafe_arguments(value: Mapping[str, Any], kind: type, here: str) -> Iterator[str]:
    from monai.transforms.io.array import SUPPORTED_READERS

    if value.get("_mode_", "default") != "default" or "_debug_" in value:
        yield f"{here}: _mode_"
    if issubclass(kind, nn.Module) and value.get("pretrained"):
        yield f"{here}: pretrained, which fetches a file"
    if kind.__name__ == "LoadImaged":
        readers = value.get("reader") or []
        for reader in readers if isinstance(readers, list) else [readers]:
            if not isinstance(reader, str) or reader.lower() not in SUPPORTED_READERS:
                yield f"{here}: reader {reader}"
