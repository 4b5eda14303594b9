"""The documentation as a site: it builds without a warning and needs no network to be read."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from pipeline.cli.app import app
from tests.chromium import PROGRAM, chromium
from website.command_reference import walk
from website.links import relinked
from website.navigation import navigation

ROOT = Path(__file__).resolve().parents[2]
needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("material") is None,
    reason="the site needs `pip install 'organ-distill[docs]'`",
)
# What makes a browser fetch something from elsewhere; a link that is followed by hand does not.
_FETCHED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr
    return folder


@needs_mkdocs
class TestSite:
    def test_every_page_of_the_docs_is_there(self, site: Path) -> None:
        for page in (ROOT / "docs").rglob("*.md"):
            path = page.relative_to(ROOT / "docs").with_suffix(".html")
            path = path.with_name("index.html") if path.stem == "README" else path
            assert (site / path).is_file(), path

    def test_every_command_and_option_is_in_the_reference(self, site: Path) -> None:
        text = (site / "reference" / "commands.html").read_text(encoding="utf-8")
        for name, command in walk(typer.main.get_command(app), ""):
            assert f'id="pipeline-{name.replace(" ", "-")}"' in text
            for parameter in command.params:
                if parameter.param_type_name == "option":
                    assert all(f"<code>{option}</code>" in text for option in parameter.opts)

    def test_every_field_of_a_reference_has_a_meaning(self, site: Path) -> None:
        for name in ("registry", "settings"):
            text = (site / "reference" / f"{name}.html").read_text(encoding="utf-8")
            rows = re.findall(r"<tr>\s*<td><code>(\w+)</code></td>(.*?)</tr>", text, re.DOTALL)
            assert len(rows) > 40
            unsaid = [field for field, cells in rows if re.search(r"<td>\s*</td>\s*$", cells)]
            assert not unsaid, f"give these a description in their pydantic models: {unsaid}"

    def test_nothing_is_fetched_from_elsewhere(self, site: Path) -> None:
        for page in site.rglob("*.html"):
            found = _FETCHED.findall(page.read_text(encoding="utf-8"))
            assert not [tag for tag in found if 'rel="canonical"' not in tag], page.name


@needs_mkdocs
@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="there is no chromium")
def test_search_works_where_the_pages_are_files(site: Path, tmp_path: Path) -> None:
    with chromium(tmp_path) as page:
        page.open(site / "index.html")
        page.value(
            "(() => { const q = document.querySelector('.md-search__input'); q.focus();"
            " q.value = 'receipt'; q.dispatchEvent(new Event('keyup')); })()"
        )
        found = page.value(_RESULTS)
        assert any("receipt" in title.lower() for title in found), found
        assert all(url.startswith(("file:", "about:", "data:")) for url in page.requests)


_RESULTS = """new Promise(done => { const began = Date.now(); const look = () => {
  const found = [...document.querySelectorAll('.md-search-result__article h1')];
  if (found.length || Date.now() - began > 50000) done(found.map(e => e.textContent));
  else setTimeout(look, 100); }; look(); })"""


def test_tests_that_pages_name_are_there() -> None:
    """Below `tests/`: folders, files by their path, files by their name."""
    rooms = "unit|stages|faults|integration|properties|slurm|benchmarks|website"
    named = re.compile(rf"`((?:{rooms})/[\w/.]+|test_\w+\.py)`")
    for page in (ROOT / "docs").glob("*.md"):
        for path in named.findall(page.read_text(encoding="utf-8")):
            there = (ROOT / "tests" / path).exists() or (ROOT / path).exists()
            assert there or list((ROOT / "tests").rglob(path)), f"{page.name}: {path}"


class TestNavigation:
    def pages(self, nav: list[dict[str, list[object]]]) -> Iterator[str]:
        for section in nav:
            for entries in section.values():
                for entry in entries:
                    if isinstance(entry, str):
                        yield entry
                    elif isinstance(entry, dict):
                        for value in entry.values():
                            yield from [value] if isinstance(value, str) else value

    def test_each_page_stands_once(self) -> None:
        there = ["index.md", "method.md", "decisions/README.md", "decisions/0001-a.md", "new.md"]
        nav = navigation(there)
        assert sorted(self.pages(nav)) == sorted(there)
        assert nav[-1] == {"More": ["new.md"]}

    def test_an_absent_page_leaves_no_section(self) -> None:
        assert [next(iter(section)) for section in navigation(["index.md"])] == ["Begin"]


class TestLinks:
    def test_a_link_out_of_docs_leads_to_the_page_made_of_that_file(self) -> None:
        text = "[a](../CONTRIBUTING.md#tests) [b](../stages/export.yaml) [c](method.md) [d](#here)"
        assert relinked(text, "docs/export.md", "export.md") == (
            "[a](contributing.md#tests) [b](reference/files/export.md) [c](method.md) [d](#here)"
        )

    def test_a_link_of_a_page_from_the_top_leads_into_docs(self) -> None:
        text = "[a](docs/faults.md) [b](https://example.org/docs/faults.md)"
        moved = "[a](faults.md) [b](https://example.org/docs/faults.md)"
        assert relinked(text, "CONTRIBUTING.md", "contributing.md") == moved

    def test_what_stands_in_a_fence_is_left_alone(self) -> None:
        text = "```\n[a](../CONTRIBUTING.md)\n```"
        assert relinked(text, "docs/export.md", "export.md") == text
