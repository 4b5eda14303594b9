"""Content -> HTML, by the templates beside this file. Everything that is put in is escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from pipeline.html_report.content import Content, lineage_json
from pipeline.html_report.lineage import TRAINING
from pipeline.inventory.wording import counted, megabytes
from pipeline.log import duration
from pipeline.tables import in_ml

TEMPLATES = Path(__file__).parent / "templates"
# Stands in every page: by it `report` knows what it may replace.
MARK = '<p class="kicker">organ-distill, report of a student run</p>'
MOST_REGION_ROWS = 60
MOST_FLAGGED_ROWS = 20
# Longer tables of cases are closed when the page opens, and on paper.
MOST_OPEN_ROWS = 12


def render(content: Content) -> str:
    """The page, whole: styles, code and pictures are in it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "score": _score,
        "ml": in_ml,
        "percent": _percent,
        "bytes": megabytes,
        "duration": _duration,
        "counted": counted,
        "mm": _mm,
        "count": _count,
    }
    return environment.get_template("report.html").render(
        c=content,
        lineage=lineage_json(content.record, content.lineage),
        training=TRAINING,
        most_region_rows=MOST_REGION_ROWS,
        most_open_rows=MOST_OPEN_ROWS,
        most_flagged_rows=MOST_FLAGGED_ROWS,
    )


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def _mm(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _count(value: Any) -> str:
    return f"{int(value):,}".replace(",", "\u202f")
