"""References of YAML files, written from the schemas of the pydantic models that read them."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from website.markdown import cell, table

Model = type[BaseModel]
_WORDS = {"integer": "whole number", "string": "text", "boolean": "true or false"}
_ATTRIBUTE = re.compile(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", re.MULTILINE)


def describe(model: Model, anchor: str = "") -> Iterator[str]:
    """Parts of a page: one section per place in the file that holds a mapping of its own.

    Args:
        model: of the whole file, or of a part of it.
        anchor: what the anchors of its headings begin with, where a page describes several files.
    """
    values = model() if _has_defaults(model) else None
    yield from _describe(model, values, place="", anchor=anchor)


def _has_defaults(model: Model) -> bool:
    return not any(field.is_required() for field in model.model_fields.values())


def _describe(model: Model, values: BaseModel | None, *, place: str, anchor: str) -> Iterator[str]:
    schema = model.model_json_schema()
    documented = _attributes(model)
    rows, below = [], []
    for name, field in model.model_fields.items():
        meaning = field.description or documented.get(name, "")
        value = _value(field, name, values)
        default = _default(value)
        if (part := _part_of(field.annotation)) is not None:
            inner, many = part
            target = ".".join(filter(None, (place, name, many)))
            meaning = f"{meaning or _first_line(inner)}: [`{target}`](#{_anchor(anchor, target)})"
            default = "see there" if isinstance(value, BaseModel) else default
            below.append((inner, value if isinstance(value, inner) else None, target))
        words = _words(schema["properties"][name], schema.get("$defs", {}))
        rows.append([f"`{name}`", cell(words), default, cell(meaning)])
    if place:
        level = min(place.count(".") + 3, 4)
        yield f"{'#' * level} `{place}` {{ #{_anchor(anchor, place)} }}\n"
    yield _about(model)
    yield table(["field", "type", "default", "meaning"], rows)
    for inner, value, target in below:
        if value is None and _has_defaults(inner):
            value = inner()
        yield from _describe(inner, value, place=target, anchor=anchor)


def _value(field: FieldInfo, name: str, values: BaseModel | None) -> Any:
    """A field's default where it stands: that of its file, if the file has defaults for all."""
    if values is not None:
        return getattr(values, name)
    if field.is_required():
        return PydanticUndefined
    return field.get_default(call_default_factory=True)


def _part_of(annotation: Any) -> tuple[Model, str] | None:
    """The model that a field holds, and "NAME" if it holds a mapping of names to such."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    for part in typing.get_args(annotation):
        if found := _part_of(part):
            mapping = typing.get_origin(annotation) is dict
            return found[0], "NAME" if mapping else found[1]
    return None


def _anchor(*words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")


def _about(model: Model) -> str:
    """What a model's docstring says before its lists of attributes."""
    text = inspect.cleandoc(model.__doc__ or "").split("\n\nAttributes:")[0]
    return f"{text}\n"


def _first_line(model: Model) -> str:
    return inspect.cleandoc(model.__doc__ or "").split("\n")[0].rstrip(".")


def _attributes(model: Model) -> Mapping[str, str]:
    """Field -> what a docstring's `Attributes:` say of it, those of parents included."""
    found: dict[str, str] = {}
    for parent in reversed(model.__mro__):
        text = inspect.cleandoc(parent.__doc__ or "")
        _, _, listed = text.partition("Attributes:\n")
        found.update({m[1]: " ".join(m[2].split()) for m in _ATTRIBUTE.finditer(listed)})
    return found


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    elif isinstance(value, tuple):
        value = list(value)
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    text = text.removesuffix("\n...\n").strip()
    return cell(f"`{text}`" if value != "" else "empty")


def _words(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A JSON schema's type, in words."""
    if "$ref" in schema:
        target = definitions[schema["$ref"].rsplit("/", 1)[1]]
        return _words(target, definitions)
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return ", or ".join(dict.fromkeys(_words(option, definitions) for option in options))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    match schema.get("type"):
        case "null":
            return "`null`"
        case "array" if "prefixItems" in schema:
            items = [_words(item, definitions) for item in schema["prefixItems"]]
            same = len(set(items)) == 1
            return f"list of {len(items)}: {items[0] if same else '; '.join(items)}"
        case "array":
            item = _words(schema.get("items", {}), definitions)
            item = f"({item})" if ", " in item else item
            return f"list of {item}" + (", at least one" if schema.get("minItems") else "")
        case "object" if "properties" in schema:
            return "mapping"
        case "object":
            inner = schema.get("additionalProperties") or schema.get("patternProperties")
            if isinstance(inner, dict) and len(inner) == 1 and "type" not in inner:
                inner = next(iter(inner.values()))  # of the one pattern
            of = _words(inner, definitions) if isinstance(inner, dict) else "anything"
            return f"mapping of names to {of}"
        case "number" | "integer" | "string" | "boolean" as kind:
            return str(_WORDS.get(kind, kind)) + _bounds(schema)
    return "anything"


def _bounds(schema: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    pattern = schema.get("pattern", "")
    if pattern and len(pattern) < 40 and "`" not in pattern:  # it would end the code around it
        found.append(f"like `{pattern}`")
    return f" {', '.join(found)}" if found else ""
