"""The places whose error no test raises: a list that only shrinks.

`never_raised.txt` has a line for each, as `Site.key` spells it. One that begins with `? ` may be
raised or not: by chance, or because nobody has counted yet. The comparison is made when the whole
suite has run and passed, see `whole_suite_ran`. With RAISED=write the list is written anew then;
marks have to be put back by hand.
"""

from __future__ import annotations

import os
from collections.abc import Set
from pathlib import Path

import pytest

from tests.messages.sites import all_sites, site_at

LIST = Path(__file__).with_name("never_raised.txt")
MAYBE = "? "
_BY_ROOT = "root may"
# Options that leave tests out.
_CHOOSING = ("keyword", "markexpr", "lf", "deselect", "ignore", "ignore_glob", "collectonly")


def listed() -> frozenset[str]:
    """The lines of the list."""
    return frozenset(line for line in LIST.read_text(encoding="utf-8").splitlines() if line)


def verdict(raised: Set[tuple[str, int]], known: Set[str]) -> list[str]:
    """How what the tests raised differs from the list; nothing if all is well.

    Args:
        raised: file and line of each error that was made.
        known: lines of the list.
    """
    found = raised_keys(raised)
    keys = {site.key for site in all_sites()}
    plain = {key.removeprefix(MAYBE) for key in known}
    surely = {key for key in known if not key.startswith(MAYBE)}
    return [
        *(f"raised by no test: {key}" for key in sorted(keys - found - plain)),
        *(f"raised by now: {key}" for key in sorted(surely & found)),
        *(f"no longer in the code: {key}" for key in sorted(plain - keys)),
    ]


def raised_keys(raised: Set[tuple[str, int]]) -> set[str]:
    """Keys of the places that lines belong to."""
    sites = [site_at(file, line) for file, line in raised]
    return {site.key for site in sites if site is not None}


def whole_suite_ran(session: pytest.Session, exit_code: int) -> bool:
    """Whether nothing was left out: pytest was started without paths and without options that
    choose, it ended well, and no test was skipped but for being run by root."""
    options = session.config.option
    chosen = any(getattr(options, name, None) for name in _CHOOSING)
    asked = [str(text) for text in session.config.invocation_params.args]
    named = [text.split("::")[0] for text in asked if not text.startswith("-")]
    paths = [text for text in named if Path(text).exists()]
    if exit_code or chosen or paths:
        return False
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    return all(_BY_ROOT in str(report.longrepr) for report in skipped)


def rewrite(raised: Set[tuple[str, int]]) -> None:
    """Writes the list as it would have to be."""
    never = {site.key for site in all_sites()} - raised_keys(raised)
    LIST.write_text("".join(f"{key}\n" for key in sorted(never)), encoding="utf-8")


def wants_rewriting() -> bool:
    """Whether the user asked for it."""
    return os.environ.get("RAISED") == "write"
