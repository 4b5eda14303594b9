"""`summary.json` of many scored cases, in nnU-Net's own format, and the same as CSV.

The keys that nnU-Net 2 knows hold what its `compute_metrics` holds for the same label maps; its
`load_summary_json` reads the file. Labels are the organs' ids. NaN is written as nnU-Net writes it,
as `NaN`, which Python reads and strict JSON readers do not; the CSV has empty cells instead.

Three things nnU-Net does not know are added: `NSD` and `HD95_mm`; organs that nobody annotated in a
case, which are NaN there; and `foreground_mean` leaves organs without any value out, where nnU-Net
would say NaN.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pipeline.metrics import NOT_ANNOTATED, RULES, OrganScore, dice_of

# In nnU-Net's order, then ours.
METRICS: Final = (
    "Dice", "IoU", "FP", "TP", "FN", "TN", "n_pred", "n_ref", "NSD", "HD95_mm",
)  # fmt: skip
CSV_HEADER: Final = ",".join(["dataset", "case", "organ", "label", *METRICS, "reason"])


def summarise(scores: Mapping[str, Sequence[OrganScore]], ids: Mapping[str, int]) -> dict[str, Any]:
    """What goes into `summary.json`, but for settings and files.

    Args:
        scores: the scores of each case, by `dataset/case`.
        ids: organ -> label value in predictions.

    Returns:
        `metric_per_case`: a list, in the order of `scores`, of `{"case", "metrics": {label: {one of
        METRICS: number}}, "reasons": {label: why a value is NaN or the worst}}`. Where neither map
        has the organ, Dice and IoU are NaN; where only the prediction has it they are 0, and NSD
        and HD95 NaN.

        `mean`: `{label: {METRICS, "num_cases", "num_missing"}}`, NaN left out. `num_cases` counts
        cases with a Dice, `num_missing` the others; they add up to the number of cases.

        `foreground_mean`: `{METRICS}`, the mean over organs of the organ means.

        `organs`: organ -> label. `rules`: of scoring, by number.
    """
    rows: list[dict[str, Any]] = [
        {
            "case": case,
            "metrics": {str(ids[score.organ]): _metrics(score) for score in found},
            "reasons": {str(ids[s.organ]): s.reason for s in found if s.reason},
        }
        for case, found in scores.items()
    ]
    mean: dict[str, dict[str, float]] = {}
    for label in [str(value) for value in ids.values()]:
        seen = [row["metrics"][label] for row in rows if label in row["metrics"]]
        mean[label] = {key: _mean([values[key] for values in seen]) for key in METRICS}
        num_cases = sum(not math.isnan(values["Dice"]) for values in seen)
        mean[label] |= {"num_cases": num_cases, "num_missing": len(scores) - num_cases}
    return {
        "metric_per_case": rows,
        "mean": mean,
        "foreground_mean": {key: _mean([m[key] for m in mean.values()]) for key in METRICS},
        "organs": dict(ids),
        "rules": RULES,
    }


def organ_means(summary: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Organ -> metric -> mean, None for NaN."""
    return {
        organ: {key: known(value) for key, value in summary["mean"][str(label)].items()}
        for organ, label in summary["organs"].items()
    }


def overall_means(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """Metric -> mean over organs, None for NaN."""
    return {key: known(value) for key, value in summary["foreground_mean"].items()}


def to_csv(summary: Mapping[str, Any]) -> str:
    """One row per case and organ; an empty cell for NaN."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_HEADER.split(","), lineterminator="\n")
    writer.writeheader()
    for row in summary["metric_per_case"]:
        dataset, _, case = row["case"].partition("/")
        for organ, label in summary["organs"].items():
            if (values := row["metrics"].get(str(label))) is None:
                continue
            cells = {key: "" if known(value) is None else value for key, value in values.items()}
            cells |= {"dataset": dataset, "case": case, "organ": organ, "label": label}
            writer.writerow(cells | {"reason": row["reasons"].get(str(label), "")})
    return text.getvalue()


def known(value: float | None) -> float | None:
    """None for NaN."""
    return None if value is None or math.isnan(value) else value


def _metrics(score: OrganScore) -> dict[str, float]:
    if score.reason == NOT_ANNOTATED:
        return dict.fromkeys(METRICS, math.nan)
    both = score.num_overlap
    only_predicted, only_reference = score.num_predicted - both, score.num_reference - both
    either = both + only_predicted + only_reference
    return {
        "Dice": dice_of(both, score.num_predicted, score.num_reference),
        "IoU": both / either if either else math.nan,
        "FP": only_predicted,
        "TP": both,
        "FN": only_reference,
        "TN": score.num_voxels - either,
        "n_pred": score.num_predicted,
        "n_ref": score.num_reference,
        "NSD": score.nsd,
        "HD95_mm": score.hd95_mm,
    }


def _mean(values: Sequence[float]) -> float:
    """The mean without NaN; NaN if nothing is left, and no warning then."""
    present = [value for value in values if not math.isnan(value)]
    return math.fsum(present) / len(present) if present else math.nan
