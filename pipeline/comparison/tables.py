"""A comparison as tables: for a terminal, as Markdown, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.store import json_text
from pipeline.comparison.figure import draw_comparison
from pipeline.comparison.results import Results
from pipeline.comparison.statistics import CONFIDENCE, OVER_ORGANS, Difference, Estimate
from pipeline.folder import json_with, refuse_foreign, replace_files, writing
from pipeline.log import print_table

_SCORE_COLUMNS = ("case", "organ", "Dice", "NSD", "HD95_mm", "n_ref", "n_pred", "reason")


@dataclass(frozen=True)
class Table:
    """A title, a header and rows of text; a cell may have two lines."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_markdown(self) -> str:
        """Title, table, blank line."""
        lines = [list(self.columns), ["---"] * len(self.columns), *map(list, self.rows)]
        body = "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)
        return f"**{self.title}**\n\n{body}\n"


def write_results(results: Results, folder: Path) -> list[Path]:
    """Writes what a comparison found: `<split>.json`, `.md`, `.png`, `_table.csv`, `_scores.csv`.

    Raises:
        WorkFolderError: the folder cannot be written.
    """
    page, data, picture, table, scores = _files(folder, results.split)
    texts = {
        data: json_text(results.to_json()),
        page: to_markdown(results),
        table: _csv(table_rows(results)),
        scores: _csv(score_rows(results)),
    }
    with writing(folder):
        replace_files({path: text.encode() for path, text in texts.items()})
        draw_comparison(results, picture)
    return [page, data, picture, table, scores]


def check_place(folder: Path, split: str) -> None:
    """Before anything is computed: that `write_results` may write.

    Raises:
        ConfigError: files are there that `compare` did not write.
    """
    files = _files(folder, split)
    is_ours = json_with(files[1], "comparison", "split") is not None
    refuse_foreign("compare", [(path, is_ours) for path in files])


def _files(folder: Path, split: str) -> list[Path]:
    ends = (".md", ".json", ".png", "_table.csv", "_scores.csv")
    return [folder / f"{split}{end}" for end in ends]


def print_results(results: Results) -> None:
    """All tables and notices on standard output; of the metrics Dice alone."""
    tables = [configurations_table(results), scores_table(results, "Dice")]
    if len(results.configs) > 1:
        tables.append(differences_table(results, "Dice"))
    for table in tables:
        print_table(table.title, table.columns, table.rows)
    for notice in results.notices:
        print(f"note: {notice}")  # noqa: T201


def to_markdown(results: Results) -> str:
    """The same as a page, with every metric."""
    tables = [configurations_table(results)]
    for metric in results.metrics:
        tables.append(scores_table(results, metric))
        if len(results.configs) > 1:
            tables.append(differences_table(results, metric))
    notes = "".join(f"- {notice}\n" for notice in results.notices)
    page = "\n".join(table.to_markdown() for table in tables)
    return f"# {results.plan.settings.name}\n\n{page}" + (f"\n{notes}" if notes else "")


def configurations_table(results: Results) -> Table:
    """What differs, and what each took."""
    fields = results.to_json()["differing_fields"]
    rows = []
    for config in results.configs:
        runs = results.of(config)
        done = sum(run.error is None for run in runs)
        seconds = results.seconds_per_step(config)
        rows.append(
            [
                config,
                *(_value(values[config]) for values in fields.values()),
                f"{results.plan.steps[config]:,}",
                f"{results.plan.parameters[config]:,}",
                "–" if seconds is None else f"{seconds:.3f}",
                f"{done}/{len(runs)}" + ("" if done == len(runs) else " FAILED"),
            ]
        )
    columns = [
        "configuration",
        *(field.removeprefix("supervision.") for field in fields),
        "steps",
        "parameters",
        "s/step",
        "runs",
    ]
    return Table(f"{results.plan.settings.name}: what was compared", columns, rows)


def scores_table(results: Results, metric: str) -> Table:
    """Mean and standard deviation over seeds, by organ."""
    number = len(results.plan.settings.seeds)
    spread = f", mean ± std over {number} seeds" if number > 1 else ", 1 seed"
    cases = f"{len(results.plan.cases)} {results.split} cases"
    rows = [
        [config, *(_estimate(e) for e in results.estimates(config, metric).values())]
        for config in results.configs
    ]
    return Table(f"{metric}, {cases}{spread}", _columns(results), rows)


def differences_table(results: Results, metric: str) -> Table:
    """Paired differences to the baseline with their intervals, by organ."""
    rows = [
        [config, *(_difference(d) for d in results.differences(config, metric).values())]
        for config in results.configs
        if config != results.plan.baseline
    ]
    title = (
        f"{metric}: difference to {results.plan.baseline}, paired by case and seed "
        f"[{CONFIDENCE:.0%} interval]"
    )
    return Table(title, _columns(results), rows)


def table_rows(results: Results) -> list[dict[str, Any]]:
    """One row per configuration, metric and organ (or `mean`), of plain numbers."""
    rows = []
    for config in results.configs:
        for metric in results.metrics:
            apart = results.differences(config, metric)
            for organ, e in results.estimates(config, metric).items():
                row: dict[str, Any] = {"config": config, "metric": metric, "organ": organ}
                row |= {"mean": e.mean, "std": e.std, "num_runs": _finished(e)}
                d = apart[organ] if config != results.plan.baseline else None
                row |= {
                    "baseline": results.plan.baseline,
                    "difference": d.mean if d else None,
                    "low": d.low if d else None,
                    "high": d.high if d else None,
                    "num_cases": apart[organ].num_cases,
                    "note": d.note if d else "",
                }
                rows.append(row)
    return rows


def score_rows(results: Results) -> list[dict[str, Any]]:
    """One row per run, case and organ, from which all statistics can be done again."""
    return [
        {"config": run.config, "seed": run.seed, **{key: row[key] for key in _SCORE_COLUMNS}}
        for run in results.runs
        for row in run.rows
    ]


def _columns(results: Results) -> list[str]:
    return ["configuration", *results.organs, OVER_ORGANS]


def _estimate(estimate: Estimate) -> str:
    if estimate.mean is None:
        return "–"
    return f"{estimate.mean:.3f}" + ("" if estimate.std is None else f" ± {estimate.std:.3f}")


def _difference(difference: Difference) -> str:
    if difference.mean is None:
        return "–"
    if difference.low is None:
        return f"{difference.mean:+.3f}"
    return f"{difference.mean:+.3f}\n[{difference.low:+.3f}, {difference.high:+.3f}]"


def _finished(estimate: Estimate) -> int:
    return sum(value is not None for value in estimate.per_seed)


def _value(value: Any) -> str:
    """Of a setting; lists without brackets and quotes."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None else str(value) if value != "" else '""'


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
