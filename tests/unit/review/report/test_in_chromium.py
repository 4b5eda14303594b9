"""The page in a real browser: it asks for nothing, is drawn, and is moved by keys."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.chromium import PROGRAM, Page, chromium
from tests.unit.review.report.pages import page

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="the Debian package chromium is absent")


@pytest.fixture(scope="module")
def written(built_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    page(built_runs, path)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def shown(browser: Page, written: Path) -> Page:
    browser.requests.clear()
    browser.complaints.clear()
    browser.blocked.clear()
    browser.call("Emulation.setEmulatedMedia", media="", features=[])
    browser.open(written)
    browser.value("document.querySelectorAll('details').forEach(closed => closed.open = true)")
    return browser


def test_it_asks_for_itself_alone_and_has_nothing_to_complain_of(
    shown: Page, written: Path
) -> None:
    assert [url for url in shown.requests if not url.startswith("data:")] == [written.as_uri()]
    assert shown.complaints == []
    # Its own policy stands in the way of whatever would ask for more.
    shown.value("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x'}))")
    shown.value("new Promise(done => setTimeout(done, 50))")
    assert any("Content Security Policy" in text for text in shown.complaints)
    assert shown.blocked == ["csp"]


def test_every_picture_is_decoded_and_drawn(shown: Page) -> None:
    broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert shown.value(broken) == 0
    assert shown.value("document.images.length") > 0
    tile = "document.querySelector('.tile')"
    shown.value(f"{tile}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    box = shown.value(f"{tile}.getBoundingClientRect().toJSON()")
    picture = np.asarray(Image.open(io.BytesIO(shown.screenshot())).convert("RGB")).astype(int)
    top, left = int(box["top"]), int(box["left"])
    drawn = picture[top : top + int(box["height"]), left : left + int(box["width"])]
    assert drawn.std() > 10  # a CT, not a black box
    assert (drawn.max(axis=-1) - drawn.min(axis=-1) > 40).any()  # and something coloured over it


@pytest.mark.parametrize("width", [400, 1280])
def test_it_is_never_wider_than_the_window(shown: Page, written: Path, width: int) -> None:
    shown.open(written, width=width)
    assert shown.value("document.documentElement.scrollWidth") <= width


def test_arrow_keys_move_a_plane(shown: Page) -> None:
    slider = "document.querySelector('.plane input')"
    last = int(shown.value(f"{slider}.max"))
    shown.value(f"{slider}.focus()")
    shown.press("Home")
    assert shown.value(f"{slider}.value") == "0"
    where = (
        "['--column', '--row'].map(name => Number("
        "document.querySelector('.plane .tile').style.getPropertyValue(name)))"
    )
    assert shown.value(where) == [0, 0]
    shown.press("ArrowRight")
    assert shown.value(where) == [1, 0]
    assert shown.value(f"{slider}.getAttribute('aria-valuetext')").startswith("slice 2 of ")
    assert "slice 2 of" in shown.value("document.querySelector('.plane output').textContent")
    shown.press("End")
    columns = int(
        shown.value("document.querySelector('.plane .tile').style.getPropertyValue('--columns')")
    )
    assert shown.value(where) == [last % columns, last // columns]


def test_the_focus_is_seen(shown: Page) -> None:
    shown.press("Tab")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert shown.value("document.activeElement.className") == "skip"
    assert shown.value(outline) == "solid"


def test_layers_are_switched_by_the_space_bar(shown: Page) -> None:
    seen = (
        "[...document.querySelector('.case').querySelectorAll('img[data-layer=background]')]"
        ".map(i => getComputedStyle(i).display)"
    )
    assert set(shown.value(seen)) == {"none"}
    shown.value("document.querySelector('.case input[data-layer=background]').focus()")
    shown.press(" ")
    assert set(shown.value(seen)) == {"block"}
    shown.press(" ")
    assert set(shown.value(seen)) == {"none"}


def test_a_screen_reader_is_told_of_sliders_boxes_pictures_and_tables(shown: Page) -> None:
    spoken = shown.spoken()
    names = {role: [name for r, name in spoken if r == role] for role, _ in spoken}
    for role in ("slider", "checkbox", "table", "image", "heading"):
        assert names[role], role
        assert all(names[role]), role
    assert "axial slice of" in names["slider"][0]
    assert any(name.startswith("Validation Dice") for name in names["image"])


def test_dark_and_light_are_told_apart_and_paper_is_white(shown: Page) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.body).color"
    white, dark = "rgb(255, 255, 255)", [{"name": "prefers-color-scheme", "value": "dark"}]
    light = [{"name": "prefers-color-scheme", "value": "light"}]
    shown.call("Emulation.setEmulatedMedia", features=light)
    assert shown.value(paper) == white
    shown.call("Emulation.setEmulatedMedia", features=dark)
    assert shown.value(paper) != white
    shown.call("Emulation.setEmulatedMedia", media="print", features=dark)
    assert (shown.value(paper), shown.value(ink)) == (white, "rgb(0, 0, 0)")
    assert shown.value("getComputedStyle(document.querySelector('.plane input')).display") == "none"
    # Else what follows, the next case or a section, would have to begin on the same page.
    caption = "getComputedStyle(document.querySelector('.panels figcaption')).breakAfter"
    assert shown.value(caption) == "auto"


def test_it_prints(shown: Page) -> None:
    pdf = shown.pdf()
    assert pdf.startswith(b"%PDF-")
    assert pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") >= 1
    assert b"/Subtype /Image" in pdf


def test_without_scripts_there_are_pictures_and_no_dead_controls(
    browser: Page, written: Path
) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(written)
        control = "getComputedStyle(document.querySelector('.plane input')).visibility"
        assert browser.value(control) == "hidden"
        assert browser.value("document.querySelectorAll('.tile img:not([hidden])').length") > 0
        assert browser.value(
            "[...document.querySelectorAll('img[data-layer=background]')].every(i => i.hidden)"
        )
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
