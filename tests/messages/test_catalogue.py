"""Every error message of the code base: what, where, what to do, in words of a user.

What the source shows is checked here; what errors say when they are raised is read in every test
(`every_error_reads_well` in tests/conftest.py).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, PipelineError
from tests.messages.ledger import JARGON, RAISED, ROOT, complaints_about
from tests.messages.never_raised import listed, verdict
from tests.messages.sites import Site, all_sites, site_at
from tests.messages.troubleshooting import PAGE, page

# Places that say neither where nor what to do themselves, and why not.
WHOLE_TEXTS = {
    "pipeline/config.py: ‹texts›": "one mistake of a YAML file: the text has line and remedy",
    "pipeline/config.py: ‹number› mistakes:": "several of them, each with line and remedy",
    "pipeline/layouts/begin.py: ‹problems›": "what is not known, each with its flag and remedy",
    "pipeline/layouts/begin.py: ‹temporary›": "the registry's own error, as it was raised",
}


def sites() -> list[pytest.param]:  # type: ignore[valid-type]
    return [pytest.param(site, id=f"{site.file}:{site.first}") for site in all_sites()]


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


@pytest.mark.parametrize("site", sites())
def test_a_message_says_what_where_and_what_to_do(site: Site) -> None:
    if any(site.key.startswith(known) for known in WHOLE_TEXTS):
        return
    assert site.what
    for text in site.what:
        # ‹…› at the end is another text: what it is in the end is read when it is raised.
        assert text.rstrip().endswith((".", "?", "›")), f"no sentence: {text}"
    assert site.where or all("--" in text for text in site.what), "no place"
    assert site.fix, "nothing to do"
    for text in site.fix:
        assert text.strip().endswith((".", "?", "›")), f"no sentence: {text}"


@pytest.mark.parametrize("site", sites())
def test_a_message_has_words_of_a_user(site: Site) -> None:
    for text in (*site.what, *site.where, *site.fix):
        plain = re.sub(r"‹[^›]*›|`[^`]*`", "", text)
        found = JARGON.search(plain)
        assert found is None, f"{found}: {text}"


def test_reasons_are_of_places_that_exist() -> None:
    keys = [site.key for site in all_sites()]
    for known in WHOLE_TEXTS:
        assert any(key.startswith(known) for key in keys), known


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
        from pipeline.network import pick_device

        with pytest.raises(ConfigError):
            pick_device("abacus")
        (site,) = {
            site_at(file, line)
            for file, line in RAISED.sites
            if file == "pipeline/network.py" and "is no device" in str(site_at(file, line))
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
        assert verdict(raised, frozenset({"pipeline/a.py: gone."})) == [
            "no longer in the code: pipeline/a.py: gone."
        ]
        assert verdict(raised, frozenset({f"? {some.key}"})) == []

    def test_the_list_names_places_of_the_code(self) -> None:
        keys = {site.key for site in all_sites()}
        assert [key for key in listed() if key.removeprefix("? ") not in keys] == []


def test_the_page_is_what_the_catalogue_says() -> None:
    """`python -m tests.messages.troubleshooting` writes it."""
    assert Path(PAGE).read_text(encoding="utf-8") == page()


def _family(kind: type[PipelineError]) -> set[type[PipelineError]]:
    return {kind}.union(*(_family(child) for child in kind.__subclasses__()))
