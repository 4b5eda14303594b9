"""What a TorchScript or torch.export file is, found out without running anything it holds.

A TorchScript file can do no more than TorchScript. A torch.export file is data by intention, but
`torch.export.load` unpickles what the file calls a pickle, follows any dotted name that it gives as
an operator, evaluates its shape expressions as Python, and loads compiled libraries. So the archive
is read here first, and only what plain exported networks consist of may pass.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.errors import TeacherError

_OPERATOR = re.compile(
    r"torch\.ops\.aten\.\w+(\.\w+)?|_operator\.[a-z]+"
    r"|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)"
)
_SETTINGS = re.compile(r"archive_(format|version)|version|byteorder|\.data/\w+|extra/.*")
_TENSORS = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
_CONFIGS = re.compile(r"data/(weights|constants)/\w+_config\.json")
_SYMBOL = re.compile(r"[a-z]+\d+|L|[A-Z]\w*")
_EXPRESSION = (
    ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.keyword, ast.Subscript,
    ast.Attribute, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip
_AGAIN = "Save the network again: `torch.jit.save`, or `torch.export.save` of an exported program."


@dataclass(frozen=True)
class Exported:
    """What an archive says of itself.

    Attributes:
        form: which of the two it is.
        devices: types of the devices that a torch.export file is bound to.
    """

    form: Literal["torchscript", "torch.export"]
    devices: frozenset[str]


def inspect_archive(path: Path, *, where: str, trusted: bool) -> Exported:
    """Looks into a file.

    Args:
        path: the file.
        where: named in errors.
        trusted: the user vouches for the file: it may hold what runs code when it is loaded.

    Raises:
        TeacherError: absent, no such file, or one that would run code when it is loaded.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            # torch looks members up without regard to case: two of one name could hide one.
            if len({name.lower() for name in names}) < len(archive.namelist()):
                raise _refused("an archive that holds two files of one name", where)
            if "constants.pkl" in names and any(name.startswith("code/") for name in names):
                return Exported("torchscript", frozenset())
            if "archive_format" not in names:
                raise _refused(_what_else(names), where)
            found = [] if trusted else list(_unsafe(archive, names))
            programs = [n for name, n in names.items() if name.startswith("models/")]
            devices = {d for name in programs for d in _devices(json.loads(archive.read(name)))}
    except FileNotFoundError as error:
        raise TeacherError(
            "the weights do not exist.", where=where, fix="Correct `weights` in the registry."
        ) from error
    except (OSError, zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _refused(f"neither a TorchScript nor a torch.export file ({error})", where) from error
    if found:
        raise TeacherError(
            f"loading this torch.export file would run more than a network: {'; '.join(found)}.",
            where=where,
            fix="If you know where it comes from and want that, say so: `--trust` and the "
            "teacher's name.",
        )
    return Exported("torch.export", frozenset(devices))


def _what_else(names: dict[str, str]) -> str:
    if "data.pkl" in names:
        return (
            "a file of weights or a pickled module (`torch.save`), which says nothing of the "
            "network or runs any code"
        )
    if "serialized_exported_program.json" in names:
        return "a torch.export file of an old format"
    return "neither a TorchScript nor a torch.export file"


def _refused(what: str, where: str) -> TeacherError:
    return TeacherError(f"{what}.", where=where, fix=_AGAIN)


def _unsafe(archive: zipfile.ZipFile, names: dict[str, str]) -> Iterator[str]:
    """Each place of a torch.export archive that may run code."""
    for name, member in names.items():
        if name.startswith("models/"):
            yield from _unsafe_program(json.loads(archive.read(member)))
        elif _CONFIGS.fullmatch(name):
            payloads = json.loads(archive.read(member))["config"].values()
            for path in sorted({p["path_name"] for p in payloads if p["use_pickle"]}):
                data = archive.read(f"{member.rpartition('/')[0]}/{path}")
                yield from _unsafe_pickle(path, data)
        elif name.startswith("data/sample_inputs/"):
            yield from _unsafe_pickle(name, archive.read(member))
        elif not (_SETTINGS.fullmatch(name) or _TENSORS.fullmatch(name)):
            yield f"{name} is no tensor"


def _unsafe_pickle(name: str, data: bytes) -> Iterator[str]:
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever it is, it is not plain tensors
        yield f"{name} is a pickle of more than tensors ({type(error).__name__})"


def _unsafe_program(program: Any) -> Iterator[str]:
    for key, value in _walk(program):
        if key == "target" and isinstance(value, str) and not _OPERATOR.fullmatch(value):
            yield f"it calls {value}"
        elif key in ("as_operator", "as_custom_obj"):
            yield f"it passes on {value}"
        elif key == "expr_str" and not _is_arithmetic(value):
            yield f"it evaluates {value!r}"
        elif key == "guards_code":
            for guard in value:
                if not _is_arithmetic(guard):
                    yield f"it evaluates {guard!r}"


def _is_arithmetic(text: str) -> bool:
    """Sizes, symbols, and functions of them as torch writes them; nothing that reaches further."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, TypeError):
        return False
    for node in nodes:
        match node:
            case ast.Name(id=name) if not _SYMBOL.fullmatch(name):
                return False
            case ast.Attribute(attr=name) if name != "size":
                return False
            case ast.Call(func=function) if not isinstance(function, (ast.Name, ast.Attribute)):
                return False
            case ast.Constant(value=str(name)) if not re.fullmatch(r"\w+", name):
                return False
            case _ if not isinstance(node, _EXPRESSION):
                return False
    return True


def _devices(program: Any) -> Iterator[str]:
    for key, value in _walk(program):
        if key in ("device", "as_device") and isinstance(value, dict) and "type" in value:
            yield str(value["type"])


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of nested JSON."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner)
