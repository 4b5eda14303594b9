"""Making a page as it is typed, and reading it as a browser does, by Python's own parser."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from pipeline.cli.app import app
from tests.tiny import work_of

RUN = "taught"
_VOID = {"meta", "img", "input", "br", "link"}


@dataclass
class Element:
    """A tag with what is in it."""

    tag: str
    attributes: dict[str, str]
    parent: Element | None
    parts: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text in it, spaces collapsed."""
        said = "".join(part if isinstance(part, str) else f" {part.text} " for part in self.parts)
        return " ".join(said.split())

    def all(self, tag: str = "", **wanted: str) -> list[Element]:
        """Elements below it, by tag and attributes; `class_` for class."""
        attributes = {name.rstrip("_").replace("_", "-"): v for name, v in wanted.items()}
        found = []
        for part in self.parts:
            if isinstance(part, Element):
                fits = all(part.attributes.get(name) == v for name, v in attributes.items())
                if fits and tag in ("", part.tag):
                    found.append(part)
                found += part.all(tag, **wanted)
        return found

    def one(self, tag: str = "", **wanted: str) -> Element:
        """The only one."""
        (found,) = self.all(tag, **wanted)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = self.here = Element("", {}, None)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, self.here)
        self.here.parts.append(element)
        if tag not in _VOID:
            self.here = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.here.parts.append(Element(tag, {n: v or "" for n, v in attrs}, self.here))

    def handle_endtag(self, tag: str) -> None:
        assert self.here.tag == tag, f"</{tag}> ends <{self.here.tag}>"
        assert self.here.parent is not None
        self.here = self.here.parent

    def handle_data(self, data: str) -> None:
        self.here.parts.append(data)


def parse(text: str) -> Element:
    """A page, every tag of which is closed in order."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.here is reader.root
    return reader.root


def call(registry: Path, output: Path | None, *arguments: str, run: str = RUN) -> Result:
    options = ["-r", str(registry), "-w", str(work_of(registry)), "-q", "--device", "cpu"]
    where = [] if output is None else ["-o", str(output)]
    return CliRunner().invoke(app, ["report", run, *options, *where, *arguments])


def page(registry: Path, output: Path, *arguments: str, run: str = RUN) -> Element:
    result = call(registry, output, *arguments, run=run)
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stdout == f"{output}\n"
    return parse(output.read_text(encoding="utf-8"))


def folder_of(registry: Path, run: str = RUN) -> Path:
    return work_of(registry) / "students" / run


def recorded(registry: Path, run: str = RUN) -> dict[str, Any]:
    """What the run's config.json holds."""
    content: dict[str, Any] = json.loads((folder_of(registry, run) / "config.json").read_text())
    return content
