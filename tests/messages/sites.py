"""Every place in the code base that makes a `PipelineError`, found in the source, with its texts.

A text is a template: what the code fills in stands in ‹angle quotes›. Where a text has several
forms (`a if x else b`), all of them are there.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("pipeline", "stages")
Texts = tuple[str, ...]
_FAMILY = "PipelineError"


@dataclass(frozen=True)
class Site:
    """One place.

    Attributes:
        key: its text, which stays when lines and files move; a number is added to the second of a
            kind.
        file: relative to the repository.
        first, last: lines of the call.
        kind: class of the error; `error` where the caller says which.
        what, where, fix: forms of each part; empty where it is left out.
    """

    key: str
    file: str
    first: int
    last: int
    kind: str
    what: Texts
    where: Texts
    fix: Texts


@cache
def all_sites() -> tuple[Site, ...]:
    """In the order of files and lines."""
    trees = {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    kinds = _kinds(trees.values())
    constants = {file: _constants(tree) for file, tree in trees.items()}
    found: list[Site] = []
    for file, tree in trees.items():
        known = {**_imported(tree, constants), **constants[file]}
        found += sorted(_sites(file, tree, kinds, known), key=lambda site: site.first)
    return tuple(_numbered(found))


def site_at(file: str, line: int) -> Site | None:
    """The site whose call covers a line; the innermost of several."""
    there = [s for s in all_sites() if s.file == file and s.first <= line <= s.last]
    return min(there, key=lambda site: site.last - site.first, default=None)


def _kinds(trees: Iterator[ast.Module] | object) -> set[str]:
    """Names of the whole family."""
    kinds = {_FAMILY}
    classes = [
        node
        for tree in trees  # type: ignore[attr-defined]
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    for _ in classes:  # a child may stand before its parent
        kinds |= {c.name for c in classes if kinds & {getattr(b, "id", "") for b in c.bases}}
    return kinds


def _sites(file: str, tree: ast.AST, kinds: set[str], known: Mapping[str, Texts]) -> Iterator[Site]:
    """Of one scope and, with what they know, of the functions in it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            named = {argument.arg for argument in _arguments(node) if _is_kind(argument)}
            hidden = {argument.arg for argument in _arguments(node)}
            outer = {name: texts for name, texts in known.items() if name not in hidden}
            yield from _sites(file, node, kinds | named, {**outer, **_assigned(node, outer)})
            continue
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in kinds:
            yield _site(file, node, known)
        yield from _sites(file, node, kinds, known)


def _site(file: str, call: ast.Call, known: Mapping[str, Texts]) -> Site:
    parts = {word.arg: texts_of(word.value, known) for word in call.keywords if word.arg}
    what = texts_of(call.args[0], known) if call.args else ()
    assert isinstance(call.func, ast.Name)
    return Site(
        (what[0] if what else "").replace("\n", " "),
        file,
        call.lineno,
        call.end_lineno or call.lineno,
        call.func.id,
        what,
        parts.get("where", ()),
        parts.get("fix", ()),
    )


def texts_of(node: ast.expr, known: Mapping[str, Texts]) -> Texts:
    """The forms that a text can have, as far as the source says."""
    match node:
        case ast.Constant(value=str(text)):
            return (text,)
        case ast.JoinedStr(values=values):
            return _joined([texts_of(value, known) for value in values])
        case ast.FormattedValue(value=value):
            return _inserted(value, known)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return _joined([texts_of(left, known), texts_of(right, known)])
        case ast.IfExp(body=body, orelse=other):
            return (*texts_of(body, known), *texts_of(other, known))
        case ast.BoolOp(values=values):
            return tuple(text for value in values for text in texts_of(value, known))
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.Call(func=ast.Name(id="str"), args=[inner]):
            return texts_of(inner, known)
    return (f"‹{_name_of(node)}›",)


def _inserted(value: ast.expr, known: Mapping[str, Texts]) -> Texts:
    """What stands in braces: constants and forms are shown, all else by its name."""
    if isinstance(value, ast.IfExp) or (isinstance(value, ast.Name) and value.id in known):
        return texts_of(value, known)
    return (f"‹{_name_of(value)}›",)


def _name_of(node: ast.expr) -> str:
    match node:
        case ast.Attribute(attr="__name__"):
            return "kind"
        case ast.Attribute(attr="strerror"):
            return "reason"
        case ast.Attribute(attr="stderr"):
            return "its own words"
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.strip("_").replace("_", " ").replace("num ", "number of ").lower()
        case ast.Call(func=ast.Attribute(attr="join"), args=[inner]):
            return _name_of(inner)
        case ast.Call(func=ast.Name(id="len"), args=[_]):
            return "number"
        case ast.Call(func=ast.Name(id="map"), args=[_, inner]):
            return _name_of(inner)
        case ast.Call(args=[inner, *_]) | ast.Subscript(value=inner):
            return _name_of(inner)
        case ast.Call(func=ast.Attribute(value=inner)):
            return _name_of(inner)
        case (
            ast.GeneratorExp(generators=[generator, *_]) | ast.ListComp(generators=[generator, *_])
        ):
            return _name_of(generator.iter)
        case ast.BoolOp(values=[inner, *_]):
            return _name_of(inner)
    return "…"


def _joined(parts: list[Texts]) -> Texts:
    return tuple("".join(form) for form in product(*parts))


def _constants(tree: ast.Module) -> dict[str, Texts]:
    return _assigned(tree, {})


def _assigned(scope: ast.AST, known: Mapping[str, Texts]) -> dict[str, Texts]:
    """Names that a scope gives texts to; all of them where there are several."""
    found: dict[str, Texts] = {}
    for node in ast.walk(scope) if isinstance(scope, ast.FunctionDef) else scope.body:  # type: ignore[attr-defined]
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(value, ast.expr) and _is_text(value):
                texts = texts_of(value, {**known, **found})
                found[target.id] = tuple(dict.fromkeys((*found.get(target.id, ()), *texts)))
    return found


def _is_text(node: ast.expr) -> bool:
    """Whether it can only be a text."""
    match node:
        case ast.Constant(value=value):
            return isinstance(value, str)
        case ast.JoinedStr():
            return True
        case ast.IfExp(body=body, orelse=other):
            return _is_text(body) and _is_text(other)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return _is_text(left) or _is_text(right)
    return False


def _imported(tree: ast.Module, constants: Mapping[str, Mapping[str, Texts]]) -> dict[str, Texts]:
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            there = constants.get(f"{node.module.replace('.', '/')}.py", {})
            found |= {a.asname or a.name: there[a.name] for a in node.names if a.name in there}
    return found


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    return [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]


def _is_kind(argument: ast.arg) -> bool:
    """Whether a parameter is a class of errors."""
    return argument.annotation is not None and f"type[{_FAMILY}]" in ast.unparse(
        argument.annotation
    )


def _numbered(sites: list[Site]) -> Iterator[Site]:
    seen: Counter[str] = Counter()
    for site in sites:
        seen[site.key] += 1
        number = seen[site.key]
        yield site if number == 1 else replace(site, key=f"{site.key} ({number})")
