"""Every mistake at once, each with its line; one digest for one meaning."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from pipeline.config import (
    Config,
    canonical_json,
    digest,
    file_sha256,
    load_config,
    short,
)
from pipeline.errors import ConfigError, RegistryError
from tests.messages.ledger import JARGON


class Inner(Config):
    size: int = Field(default=1, ge=1)
    low: float = 0.0
    high: float = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Inner:
        if self.low >= self.high:
            raise ValueError("Low must be below high")
        return self


class Outer(Config):
    name: str = "a"
    inner: Inner = Inner()
    items: tuple[Inner, ...] = ()
    named: dict[str, Inner] = Field(default_factory=dict)


class Required(Config):
    inner: Inner
    steps: int


def complaint(tmp_path: Path, text: str, model: type[Config] = Outer) -> list[str]:
    """The lines of the error's message, without the folder."""
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, model)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def test_an_empty_file_means_all_defaults(tmp_path: Path) -> None:
    for text in ("", "# only a comment\n"):
        path = tmp_path / "a.yaml"
        path.write_text(text)
        assert load_config(path, Outer) == Outer()


def test_every_mistake_is_told_at_once_with_its_line_in_the_order_of_the_file(
    tmp_path: Path,
) -> None:
    text = """\
# a comment
name: [1]
inner:
  size: none

  colour: red
items:
  - size: 2
  - size: 0
named:
  x:
    low: 3
    high: 2
extra: 1
name: b
"""
    head, *lines = complaint(tmp_path, text)
    assert head == "6 mistakes:"
    assert [line.split(" ")[2] for line in lines] == [
        "a.yaml:4:",
        "a.yaml:6:",
        "a.yaml:9:",
        "a.yaml:11:",
        "a.yaml:14:",
        "a.yaml:15:",
    ]
    assert "inner.size: must be a whole number" in lines[0]
    assert "'none'" in lines[0]
    assert "inner.colour: unknown key." in lines[1]
    assert "items.1.size: must be greater than or equal to 1, not 0." in lines[2]
    assert "named.x: low must be below high." in lines[3]
    assert "extra: unknown key. Known here: inner, items, name, named." in lines[4]
    assert "name: written twice. Keep one of the two." in lines[5]


def test_one_mistake_is_one_line(tmp_path: Path) -> None:
    assert complaint(tmp_path, "\n\nname: 3\n") == [
        "a.yaml:3: name: must be a text, not 3. YAML reads it as a number: write '3' in quotes."
    ]


def test_a_missing_key_is_told_at_the_line_of_its_parent(tmp_path: Path) -> None:
    assert complaint(tmp_path, "\ninner: {}\n", Required) == [
        "a.yaml:2: steps: required, but missing. Add it."
    ]


def test_duplicate_keys_are_found_at_any_depth(tmp_path: Path) -> None:
    _, *lines = complaint(tmp_path, "named:\n  x: {size: 1}\n  y: {size: 1, size: 2}\n  x: {}\n")
    assert lines == [
        "  a.yaml:3: named.y.size: written twice. Keep one of the two.",
        "  a.yaml:4: named.x: written twice. Keep one of the two.",
    ]


def test_a_key_that_is_no_string_still_has_its_line(tmp_path: Path) -> None:
    (line,) = complaint(tmp_path, "named:\n  x: {}\n  7: {}\n")
    assert line.startswith("a.yaml:3: named.7")


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("name: a\nother: b: c\n", ":2", "mapping values are not allowed"),
        ("name: [1,\n", ":2", "not valid YAML"),
        ("name: a\n\tx: 1\n", ":2", "not valid YAML"),
        ("name: a\n---\nname: b\n", ":2", "another document"),
        ("name: 2020-99-99\n", "", "month must be in 1..12"),
        ("name: a\x00b\n", "", "special characters"),
        ("name: !!python/object/apply:os.getcwd []\n", ":1", "constructor"),
        ("items: &x [*x]\n", "", "contains itself"),
    ],
)
def test_what_is_not_yaml_is_told_with_its_line(
    tmp_path: Path, text: str, line: str, says: str
) -> None:
    message = " ".join(complaint(tmp_path, text))
    assert message.startswith(f"a.yaml{line}: ")
    assert says in message


def test_a_file_that_is_absent_or_no_text_is_told_by_its_path(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xfd")
    for path in (tmp_path / "absent.yaml", binary, tmp_path):
        with pytest.raises(ConfigError) as caught:
            load_config(path, Outer)
        assert str(caught.value).startswith(f"{path}: cannot be read")
        assert caught.value.exit_code == 2


def test_a_list_in_place_of_the_whole_is_one_message(tmp_path: Path) -> None:
    (line,) = complaint(tmp_path, "- name: a\n")
    assert line.startswith("a.yaml:1: must be a mapping (name: value)")


def test_the_caller_names_the_kind_of_error(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for text in (None, "a: b: c", "colour: red"):
        if text is not None:
            path.write_text(text)
        with pytest.raises(RegistryError):
            load_config(path, Outer, error=RegistryError)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Inner().size = 3  # type: ignore[misc]


class Where(Config):
    path: Path = Path("a/b")
    window: tuple[float, ...] = (1.0, 2.5)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": {"x": 1, "y": 2}}, {"a": {"y": 2, "x": 1}}),
        ({"a": 1}, {"a": 1.0}),
        ([-0.0], [0]),
        ((1, (2, 3)), [1, [2, 3]]),
        (Path("a") / "b", "a/b"),
        ({3, 1, 2}, [1, 2, 3]),
        (Inner(low=0, high=2), {"high": 2, "low": 0, "size": 1}),
        (Where(), {"path": "a/b", "window": [1, 2.5]}),
    ],
)
def test_one_meaning_has_one_digest(one: Any, other: Any) -> None:
    assert canonical_json(one) == canonical_json(other)
    assert digest(one) == digest(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"b": 1}),
        ([1, 2], [2, 1]),
        ({"a": 1}, {"a": 1 + 1e-12}),
        ({"a": 1}, {"a": "1"}),
        ({"a": None}, {}),
        ({"a": True}, {"a": "true"}),
    ],
)
def test_another_meaning_has_another_digest(one: Any, other: Any) -> None:
    assert digest(one) != digest(other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_have_no_digest(value: float) -> None:
    class Number(Config):
        x: float

    for content in (value, {"a": [value]}, Number(x=value)):
        with pytest.raises(ValueError, match="JSON"):
            digest(content)


def test_the_digest_is_sha256_of_the_canonical_text() -> None:
    value = {"b": [1.0, 2.5], "a": "µ"}
    assert canonical_json(value) == '{"a":"\\u00b5","b":[1,2.5]}'
    assert digest(value) == hashlib.sha256(canonical_json(value).encode()).hexdigest()
    assert short(digest(value)) == digest(value)[:16]


def test_sha256_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc" * 100_000)
    assert file_sha256(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()


class Everything(Config):
    number: int = 0
    share: float = 0
    gated: bool = False
    name: str = Field(default="x", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    two: tuple[int, int] = (1, 2)
    kind: Literal["a", "b"] = "a"
    some: dict[str, int] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("number: many", "number: must be a whole number, not 'many'."),
        ("number: 1.5", "number: must be a whole number, not 1.5."),
        ("number:", "number: must be a whole number, not empty."),
        ("share: x", "share: must be a number, not 'x'."),
        ("gated: 3", "gated: must be true or false, not 3."),
        ("name: true", "name: must be a text, not true."),
        ("name: a/b", "name: may have letters, digits, dots, dashes and underscores"),
        ("two: 3", "two: must be a list, not 3."),
        ("two: [1, 2, 3]", "two: must have at most 2 items, not [1, 2, 3]."),
        ("kind: c", "kind: must be 'a' or 'b', not 'c'."),
        ("some: [1]", "some: must be a mapping (name: value), not [1]."),
    ],
)
def test_mistakes_are_told_without_words_of_programmers(
    tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, Everything)
    assert says in str(caught.value)
    assert not JARGON.search(str(caught.value).partition(": ")[2])
