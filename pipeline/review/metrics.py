"""Dice, normalised surface Dice and HD95 of one organ at a time, in millimetres; and many cases'
summary.

Arrays are (D, H, W) and spacing is along z, y, x, as everywhere (see `pipeline.data.volume`). Three
rules make a score readable without a footnote:

1. The reference lacks the organ, and so does the prediction: every value is NaN, with a reason. The
   prediction alone has it: Dice 0, as nnU-Net counts it; NSD and HD95 are NaN, for there is no
   surface to be near to.
2. The reference has the organ and the prediction is empty: Dice 0, NSD 0, HD95 the diagonal of the
   image. A miss is never NaN, or a mean over cases would reward it.
3. Spacing is always asked for; there is no default under which a distance would be in voxels.

One slice (an axis of one voxel) is measured in its plane: its outlines are the surfaces, nothing is
known of what lies before and behind it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from pipeline.config import sha256_if_there
from pipeline.data.volume import Array, Grid
from pipeline.errors import GeometryError
from pipeline.log import csv_text
from pipeline.review.predictions import json_beside, prediction_file
from pipeline.review.surfaces import Mask, diagonal_mm, surface_scores

# Of the rules above: raised with them, so that scores kept in files are not mixed.
RULES = 3
ABSENT = "organ absent from the reference"
NOT_ANNOTATED = "not annotated in this case"
EMPTY_PREDICTION = "prediction is empty"


@dataclass(frozen=True)
class OrganScore:
    """How well one organ of one case was segmented.

    Attributes:
        dice: overlap, 0 to 1; NaN if neither side has the organ.
        nsd: normalised surface Dice, 0 to 1; NaN if the reference lacks the organ, or if surfaces
            were not asked for.
        hd95_mm: 95 % Hausdorff distance in mm; NaN likewise.
        num_reference: voxels of the organ in the reference, ignored voxels left out.
        num_predicted: voxels of the organ in the prediction, ignored voxels left out. Where the
            reference lacks the organ, this is the number of false positives.
        reason: why a value is NaN or the worst there is; empty if the values speak for themselves.
        num_overlap: voxels of the organ in both, ignored voxels left out.
        num_voxels: all voxels that were judged: those of the image without ignored ones.
    """

    organ: str
    dice: float
    nsd: float
    hd95_mm: float
    num_reference: int
    num_predicted: int
    reason: str = ""
    num_overlap: int = 0
    num_voxels: int = 0

    @classmethod
    def missing(
        cls, organ: str, reason: str, *, num_predicted: int = 0, num_voxels: int = 0
    ) -> OrganScore:
        """A score where there is nothing to find: Dice 0 of what was predicted all the same, NaN
        for the rest; and the reason in words."""
        nan, dice = math.nan, dice_of(0, num_predicted, 0)
        return cls(organ, dice, nan, nan, 0, num_predicted, reason, num_voxels=num_voxels)


MEASURES = ("Dice", "NSD", "HD95_mm")


def score_case(
    prediction: Array,
    reference: Array,
    organs: Mapping[str, int],
    grid: Grid,
    *,
    tolerance_mm: float = 3.0,
    ignore_value: int | None = 255,
    surface: bool = True,
) -> tuple[OrganScore, ...]:
    """Scores every organ of one case.

    Dice (Dice, 1945, Ecology 26:297) of voxel sets P and R is `2 |P ∩ R| / (|P| + |R|)`.

    NSD (Nikolov et al., 2018, arXiv 1809.04430) is the share of both surfaces that lies within the
    tolerance t of the other one: `(|S_P within t of S_R| + |S_R within t of S_P|) / (|S_P| +
    |S_R|)`, where |S| is an area in mm². Surface elements sit on voxel corners and carry the area
    of the marching-cubes triangles there.

    HD95 is the larger of the two directed 95th percentiles (linear between ranks) of the distance
    from each border voxel of one mask to the nearest border voxel of the other, in mm. A border
    voxel has at least one of its six neighbours outside the mask; outside the image is outside.

    In one slice an outline is what a surface is in a volume: |S| is a length in mm, a border voxel
    has one of its four neighbours in the plane outside, and the diagonal is that of the plane.

    Ignored voxels become background on both sides before anything is counted. Where an organ runs
    into an ignored region both surfaces are therefore cut along that region's edge.

    Args:
        prediction: label values, shape (D, H, W), integer or bool.
        reference: label values, shape (D, H, W), integer or bool.
        organs: label value of each organ, by name.
        ignore_value: the reference value of voxels nobody has judged; None if there is no such
            value.
        surface: whether to compute NSD and HD95, by far the slower part. If not, both are NaN,
            which needs no reason; `reason` then speaks of Dice alone.

    Returns:
        One score per organ, in the order of `organs`. If the prediction of an organ is empty,
        `hd95_mm` is the longest diagonal of the image, voxel edge to voxel edge: an upper bound
        that no prediction with at least one voxel can reach.

    Raises:
        GeometryError: the shapes differ or are not three-dimensional, the labels are not integers,
            the grid is another one, or its spacing is not three positive, finite numbers.
        ValueError: the tolerance is negative or not finite, or an organ has the ignored value.
    """
    _check_labels(prediction, reference)
    _check_grid(grid, reference, surface)
    tolerance = float(tolerance_mm)
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance_mm must be finite and not negative, not {tolerance_mm}")
    if ignore_value is not None and ignore_value in organs.values():
        raise ValueError(f"label value {ignore_value} cannot be an organ's and ignored: {organs}")

    keep = None if ignore_value is None else reference != ignore_value
    judged = reference.size if keep is None else int(keep.sum())
    scores = []
    for organ, value in organs.items():
        predicted: Mask = prediction == value
        if keep is not None:
            predicted &= keep
        expected: Mask = reference == value
        scored = _score_organ(organ, predicted, expected, grid, tolerance, surface)
        scores.append(replace(scored, num_voxels=judged))
    return tuple(scores)


def dice_of(num_overlap: int, num_predicted: int, num_reference: int) -> float:
    """Dice of counted voxels, as nnU-Net has it; NaN if neither side has any."""
    either = num_predicted + num_reference
    return 2 * num_overlap / either if either else math.nan


def score_json(score: OrganScore) -> dict[str, Any]:
    """`Dice`, `NSD`, `HD95_mm`, `n_ref`, `n_pred`, `reason`; None for NaN, which JSON has not."""
    values = (score.dice, score.nsd, score.hd95_mm)
    known = [None if math.isnan(value) else float(value) for value in values]
    counts = {"n_ref": score.num_reference, "n_pred": score.num_predicted}
    return dict(zip(MEASURES, known, strict=True)) | counts | {"reason": score.reason}


def _score_organ(
    organ: str, predicted: Mask, expected: Mask, grid: Grid, tolerance: float, surface: bool
) -> OrganScore:
    """The three rules of this module, for one organ."""
    num_predicted, num_reference = int(predicted.sum()), int(expected.sum())
    if num_reference == 0:
        return OrganScore.missing(organ, ABSENT, num_predicted=num_predicted)
    # The counts are reported anyway and make Dice exact; monai's compute_dice would sum float32.
    overlap = int((predicted & expected).sum())
    dice = dice_of(overlap, num_predicted, num_reference)
    nsd = hd95 = math.nan
    if surface and num_predicted == 0:
        nsd, hd95 = 0.0, diagonal_mm(grid)
    elif surface:
        nsd, hd95 = surface_scores(predicted, expected, grid, tolerance)
    reason = "" if num_predicted else EMPTY_PREDICTION
    return OrganScore(organ, dice, nsd, hd95, num_reference, num_predicted, reason, overlap)


def _check_grid(grid: Grid, reference: Array, surface: bool) -> None:
    if grid.shape != reference.shape:
        raise GeometryError(
            f"the label maps have shape {reference.shape}, their grid {grid.shape}.",
            where="prediction and reference",
            fix="Give the grid that they were read with.",
        )
    if not all(math.isfinite(mm) and mm > 0 for mm in grid.spacing_mm):
        raise GeometryError(
            f"the spacing must be three positive numbers of mm, not {list(grid.spacing_mm)}.",
            where="prediction and reference",
            fix="Write the file again with its spacing and orientation.",
        )
    if surface and grid.slice_axis is not None and grid.is_sheared:
        raise GeometryError(
            "the rows and columns of this slice are not at right angles, so that its outlines "
            "cannot be measured.",
            where="prediction and reference",
            fix="Set `surface: false` for Dice alone, or write the file again with square pixels.",
        )


def _check_labels(prediction: Array, reference: Array) -> None:
    if prediction.shape != reference.shape:
        raise GeometryError(
            f"the prediction has shape {prediction.shape}, the reference {reference.shape}.",
            where="prediction and reference",
            fix="Both must be on the same grid: resample one onto the other first.",
        )
    if reference.ndim != 3:
        raise GeometryError(
            f"label maps must have three axes, not shape {reference.shape}.",
            where="prediction and reference",
            fix="Give one case at a time, as (z, y, x).",
        )
    for name, labels in (("prediction", prediction), ("reference", reference)):
        # Probabilities would otherwise compare unequal to every label and score as empty.
        if labels.dtype.kind not in "biu":
            raise GeometryError(
                f"the {name} must hold whole numbers, not {labels.dtype}.",
                where=name,
                fix="Give a label map; probabilities have to be decided first.",
            )


# `summary.json` of many scored cases, in nnU-Net's own format, and the same as CSV.
#
# The keys that nnU-Net 2 knows hold what its `compute_metrics` holds for the same label maps; its
# `load_summary_json` reads the file. Labels are the organs' ids. NaN is written as nnU-Net writes
# it, as `NaN`, which Python reads and strict JSON readers do not; the CSV has empty cells instead.
#
# Three things nnU-Net does not know are added: `NSD` and `HD95_mm`; organs that nobody annotated in
# a case, which are NaN there; and `foreground_mean` leaves organs without any value out, where
# nnU-Net would say NaN.

# In nnU-Net's order, then ours.
METRICS: Final = (
    "Dice", "IoU", "FP", "TP", "FN", "TN", "n_pred", "n_ref", "NSD", "HD95_mm",
)  # fmt: skip
CSV_HEADER: Final = ",".join(["dataset", "case", "organ", "label", *METRICS, "reason"])


def summarise(scores: Mapping[str, Sequence[OrganScore]], ids: Mapping[str, int]) -> dict[str, Any]:
    """What goes into `summary.json`, but for settings and files, of scores by `dataset/case`.

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
    rows = []
    for row in summary["metric_per_case"]:
        dataset, _, case = row["case"].partition("/")
        for organ, label in summary["organs"].items():
            if (values := row["metrics"].get(str(label))) is None:
                continue
            cells = {key: "" if known(value) is None else value for key, value in values.items()}
            cells |= {"dataset": dataset, "case": case, "organ": organ, "label": label}
            rows.append(cells | {"reason": row["reasons"].get(str(label), "")})
    return csv_text(rows, CSV_HEADER.split(","))


def outdated(
    summary: Mapping[str, Any], folder: Path, now: Mapping[str, Mapping[str, str | None]]
) -> str:
    """Why a summary is not of what is there now; empty if it is.

    Args:
        now: case -> `reference_sha256` and `image_sha256` as they are now, where they are known.
    """
    if summary.get("rules") != RULES:
        return "it was scored by an earlier version"
    for row in summary["metric_per_case"]:
        case = row["case"]
        for what in ("reference", "image"):
            before, found = row.get(f"{what}_sha256"), now.get(case, {}).get(f"{what}_sha256")
            if before and found and before != found:
                return f"the {what} of {case} has changed since it was evaluated"
        try:
            path = prediction_file(folder, case)
        except GeometryError as error:
            return f"of {case}, {error.what.removesuffix('.')}"
        if sha256_if_there(path) != row["prediction_sha256"]:
            return f"the prediction of {case} has changed since it was evaluated"
        if sha256_if_there(json_beside(path)) != row["prediction_json_sha256"]:
            return f"the JSON beside {case} has changed since it was evaluated"
    return ""


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
