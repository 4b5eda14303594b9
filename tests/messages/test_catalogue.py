"""Every error message of the code base: what, where, what to do, in words of a user.

What the source shows is checked here; what errors say when they are raised is read in every test
(`every_error_reads_well` in tests/conftest.py).
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import ConfigError, PipelineError
from tests.messages.ledger import JARGON, RAISED, ROOT, complaints_about
from tests.messages.never_raised import listed, verdict, whole_suite_ran
from tests.messages.sites import Site, all_sites, site_at
from tests.messages.troubleshooting import PAGE, page

# Places that say neither where nor what to do themselves, and why not.
WHOLE_TEXTS = {
    "pipeline/config.py: ‹texts›": "one mistake of a YAML file: the text has line and remedy",
    "pipeline/config.py: ‹number› mistakes:": "several of them, each with line and remedy",
    "pipeline/data/patches.py: one slice, ": "whoever asks names the case or the image",
    "pipeline/setup/init/begin.py: ‹problems›": "what is not known, each with its flag and remedy",
    "pipeline/setup/init/begin.py: ‹temporary›": "the registry's own error, as it was raised",
}


def place(site: Site) -> str:
    """File and text."""
    return f"{site.file}: {site.key}"


def test_all_of_the_code_base_is_looked_at() -> None:
    """A search for the word finds no more; aliases would hide from the catalogue."""
    family = {c.__name__ for c in _family(PipelineError)}
    names, by_hand = "|".join(family), 0
    for folder in ("pipeline", "stages"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            by_hand += len(re.findall(rf"(?<!class )\b(?:{names})\(", text))
            assert not re.search(rf"\b(?:{names}) as \w+\b(?! *:)", text), path
    named = sum(site.kind in family for site in all_sites())
    assert named > 300
    assert named == by_hand


def missing_parts(site: Site) -> list[str]:
    """What a message lacks; nothing if it is whole."""
    # ‹…› at the end is another text: what it is in the end is read when it is raised.
    ends = (".", "?", "›")
    found = [f"no sentence: {text}" for text in site.what if not text.rstrip().endswith(ends)]
    found += [f"no sentence: {text}" for text in site.fix if not text.rstrip().endswith(ends)]
    if not site.where and not all("--" in text for text in site.what):
        found.append("it says no place")
    if not site.fix:
        found.append("it says nothing to do")
    return [f"{site.file}:{site.first}: {text}" for text in found]


def strange_words(site: Site) -> list[str]:
    """Words of programmers; what the code fills in, and code in backticks, is left out."""
    texts = [re.sub(r"‹[^›]*›|`[^`]*`", "", t) for t in (*site.what, *site.where, *site.fix)]
    found = [(text, word) for text in texts if (word := JARGON.search(text))]
    return [f"{site.file}:{site.first}: {word.group()!r} in {text}" for text, word in found]


def test_a_message_says_what_where_and_what_to_do() -> None:
    asked = [site for site in all_sites() if not place(site).startswith(tuple(WHOLE_TEXTS))]
    assert len(asked) > 300
    assert [text for site in asked for text in missing_parts(site)] == []


def test_a_message_has_words_of_a_user() -> None:
    assert [text for site in all_sites() for text in strange_words(site)] == []


def test_what_is_missing_is_found() -> None:
    site = Site("k", "a.py", 3, 3, "ConfigError", ("a kwargs problem",), (), ())
    assert missing_parts(site) == [
        "a.py:3: no sentence: a kwargs problem",
        "a.py:3: it says no place",
        "a.py:3: it says nothing to do",
    ]
    assert strange_words(site) == ["a.py:3: 'kwargs' in a kwargs problem"]


def test_reasons_are_of_places_that_exist() -> None:
    places = [place(site) for site in all_sites()]
    for known in WHOLE_TEXTS:
        assert any(there.startswith(known) for there in places), known


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ConfigError("no full stop"), "no sentence"),
        (ConfigError("a sentence.", fix="and half"), "what to do is no sentence"),
        (ConfigError("it ends twice.."), "doubled"),
        (ConfigError("two  spaces."), "doubled"),
        (ConfigError("Traceback (most recent call last): x."), "a traceback"),
        (ConfigError("x" * 5000 + "."), "5"),
    ],
)
def test_what_reads_badly_is_found(error: PipelineError, says: str) -> None:
    assert any(says in text for text in complaints_about(error))


def test_what_reads_well_is_left_alone() -> None:
    error = ConfigError("2 mistakes:\n  a.yaml:3: x.", where="--config a.yaml", fix="Try `x y`.")
    assert complaints_about(error) == []


class TestLedger:
    def test_an_error_is_noted_with_the_place_that_made_it(self) -> None:
        from pipeline.networks.by_name import pick_device

        with pytest.raises(ConfigError):
            pick_device("abacus")
        (site,) = {
            site_at(file, line)
            for file, line in RAISED.sites
            if file == "pipeline/networks/by_name.py" and "is no device" in str(site_at(file, line))
        }
        assert site is not None
        assert site.what == ("‹name› is no device.",)

    def test_every_noted_place_is_in_the_catalogue(self) -> None:
        """Of this process so far: most of the suite, if all of it runs."""
        unknown = [place for place in RAISED.sites if site_at(*place) is None]
        assert unknown == []

    def test_what_is_never_raised_is_told(self) -> None:
        some, *others = all_sites()
        raised = {(site.file, site.first) for site in others}
        assert verdict(raised, frozenset()) == [f"raised by no test: {some.key}"]
        assert verdict(raised, frozenset({some.key})) == []

    def test_the_list_only_shrinks(self) -> None:
        some, *_ = all_sites()
        raised = {(site.file, site.first) for site in all_sites()}
        assert verdict(raised, frozenset({some.key})) == [f"raised by now: {some.key}"]
        assert verdict(raised, frozenset({"gone."})) == ["no longer in the code: gone."]
        assert verdict(raised, frozenset({f"? {some.key}"})) == []

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({}, True),
            ({"args": ["--numprocesses", "auto", "--dist", "loadfile"]}, True),
            ({"args": [str(ROOT / "tests" / "unit")]}, False),
            ({"args": [f"{__file__}::TestLedger"]}, False),
            ({"keyword": "liver"}, False),
            ({"markexpr": "not slow"}, False),
            ({"lf": True}, False),
            ({"exit_code": 1}, False),
            ({"skipped": ["no Slurm can be started: no slurmctld"]}, False),
            ({"skipped": ["root may write anywhere"]}, True),
        ],
    )
    def test_it_is_asked_of_the_whole_suite_alone(
        self, changes: dict[str, Any], expected: bool
    ) -> None:
        options = {"args": [], "exit_code": 0, "skipped": [], "keyword": "", "lf": False, **changes}
        reports = [SimpleNamespace(longrepr=("a.py", 1, why)) for why in options["skipped"]]
        reporter = SimpleNamespace(stats={"skipped": reports})
        config = SimpleNamespace(
            option=SimpleNamespace(**options),
            invocation_params=SimpleNamespace(args=options["args"]),
            pluginmanager=SimpleNamespace(get_plugin=lambda name: reporter),
        )
        session: Any = SimpleNamespace(config=config)
        assert whole_suite_ran(session, options["exit_code"]) == expected

    def test_the_list_names_places_of_the_code(self) -> None:
        keys = {site.key for site in all_sites()}
        assert [key for key in listed() if key.removeprefix("? ") not in keys] == []


def test_the_page_is_what_the_catalogue_says() -> None:
    """`python -m tests.messages.troubleshooting` writes it."""
    assert Path(PAGE).read_text(encoding="utf-8") == page()


def _family(kind: type[PipelineError]) -> set[type[PipelineError]]:
    return {kind}.union(*(_family(child) for child in kind.__subclasses__()))
