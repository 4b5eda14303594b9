"""Commands that the pages show are held to the command line: they exist, with their options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from pipeline.cli.app import app
from tests.website.command_lines import CommandLine, command_lines

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
_PLACEHOLDER = re.compile(r"^(?:[A-Z_]+|‹.+›)$")


def mistake(line: CommandLine) -> str | None:
    """What is wrong with a command, or None."""
    command: Any = typer.main.get_command(app)
    words, name = list(line.words), "pipeline"
    while children := getattr(command, "commands", None):
        if not words or words[0].startswith("-"):
            return None if not line.whole or words else f"`{name}` wants a command"
        if _PLACEHOLDER.match(words[0]) and (not line.whole or words[0][0] == "‹"):
            return None
        if words[0] not in children:
            return f"`{name}` has no command `{words[0]}`. It has: {', '.join(children)}"
        command, name = children[words[0]], f"{name} {words.pop(0)}"
    context = command.make_context(name, [], resilient_parsing=True)
    known = {opt for p in command.get_params(context) for opt in (*p.opts, *p.secondary_opts)}
    for word in words:
        option = word.split("=")[0]
        if option.startswith("-") and not re.match(r"-\d", option) and option not in known:
            return f"`{name}` has no option `{option}`"
    if line.whole and "--help" not in words and "-h" not in words:
        try:
            command.make_context(name, words)
        except Exception as error:  # of Typer's own copy of click
            if not hasattr(error, "format_message"):
                raise
            return f"`{name}`: {error.format_message()}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_one(page: Path) -> None:
    found = [(line, mistake(line)) for line in command_lines(page)]
    wrong = [f"{line.page}:{line.line}: {what}" for line, what in found if what]
    assert not wrong, "\n".join(wrong)


def test_the_pages_show_commands_at_all() -> None:
    lines = [line for page in PAGES for line in command_lines(page)]
    assert sum(line.whole for line in lines) > 50
    assert {"quickstart.md", "README.md", "inspect.md"} <= {line.page for line in lines}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```sh\npipeline trian-student -r a.yaml\n```", "page.md:2: `pipeline` has no command"),
        (
            "```sh\npipeline cache-teachers \\\n  --windw 3\n```",
            "page.md:2: .* no option `--windw`",
        ),
        ("```sh\npipeline train-student --workers many\n```", "page.md:2: .*valid integer"),
        ("```sh\npipeline evaluate\n```", "page.md:2: .*[Mm]issing"),
        ("    pipeline cache lss\n", "page.md:1: `pipeline cache` has no command `lss`"),
        ("words `pipeline status --jsn` words", "page.md:1: .* no option `--jsn`"),
        ('```sh\nR="-x a"\npipeline status $R\n```', "page.md:3: .* no option `-x`"),
    ],
)
def test_a_wrong_command_is_named_with_its_page_and_line(
    text: str, said: str, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match=said):
        test_every_command_of_a_page_is_one(page)
