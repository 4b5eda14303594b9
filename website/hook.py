"""What MkDocs calls while it builds the site, see `hooks` in mkdocs.yml."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # MkDocs loads this file by its path
    sys.path.insert(0, str(ROOT))

from website import links, pages  # noqa: E402
from website.navigation import navigation  # noqa: E402


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made here, and says which page stands where."""
    for path, text in pages.generated(ROOT):
        files.append(File.generated(config, path, content=text))
    for source in sorted((ROOT / "website" / "assets").iterdir()):
        name = f"assets/{source.name}"
        files.append(File.generated(config, name, abs_src_path=str(source)))
    config.nav = navigation([file.src_uri for file in files.documentation_pages()])
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mends links that leave docs/."""
    sources = {there: source for source, there in links.PAGES.items() if there != "index.md"}
    path = page.file.src_uri
    return links.relinked(markdown, sources.get(path, f"docs/{path}"), path)
