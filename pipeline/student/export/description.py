"""What a program must know to use an exported student as `pipeline predict` does: as JSON."""

from __future__ import annotations

from typing import Any

from pipeline.data.labels import Intensity
from pipeline.student.checkpoint import StudentRecord
from pipeline.student.inference import SIGMA

FORMAT_VERSION = 1
INPUT, OUTPUT = "image", "logits"
# Where the axes z, y, x of an array point to: superior, anterior, right.
AXCODES = "SAR"
_SMALLEST_WEIGHT = 1e-3  # monai.data.utils.compute_importance_map


def channel_names(record: StudentRecord) -> list[str]:
    """Of the network's logits, in order."""
    return ["background", *record.label_space.organs]


def describe(record: StudentRecord, *, file: str, overlap: float) -> dict[str, Any]:
    """All that lies between a CT and its label map, as plain JSON values.

    Args:
        file: name of the network's file, beside which the description lies.
    """
    batch = ["batch", 1, *record.patch]
    return {
        "format": "organ-distill student",
        "format_version": FORMAT_VERSION,
        "network_file": file,
        "axes": {
            "order": ["z", "y", "x"],
            "axcodes": AXCODES,
            "meaning": "first axis towards superior, second towards anterior, third towards right: "
            "a NIfTI array in RAS+ order, transposed",
        },
        "spacing_mm": list(record.spacing_mm),
        "resampling": {
            "grid": "directions and centre of the field of view are the image's; "
            "max(1, round(size * old_spacing / spacing_mm)) voxels per axis; old_spacing is the "
            "length of the affine's columns; one slice keeps its voxel and its thickness",
            "image": "linear between voxel centres, the outermost value holds outside; rounded to "
            "whole HU, before and after",
            "logits": "linear, back onto the image's own grid, before argmax",
        },
        "intensity": {**_intensity(record.intensity), "air": record.intensity.air},
        "windows": {
            "shape": list(record.patch),
            "overlap": overlap,
            "starts": "per axis multiples of int(shape * (1 - overlap)), the last flush with the "
            "end of the volume",
            "padding": "a volume smaller than a window is padded with `intensity.air`: of n "
            "missing voxels floor(n / 2) before, the others after",
            "blending": "gaussian",
            "sigma": SIGMA,
            "weight": "product over axes of exp(-x^2 / (2 (sigma * shape)^2)), x from the middle "
            f"of the window, not below max(its minimum, {_SMALLEST_WEIGHT}); logits are "
            "sum(weight * logits) / sum(weight)",
        },
        "input": {"name": INPUT, "shape": batch, "axes": "N, C, z, y, x", "dtype": "float32"},
        "output": {
            "name": OUTPUT,
            "shape": ["batch", len(record.organs) + 1, *record.patch],
            "axes": "N, C, z, y, x",
            "dtype": "float32",
            "channels": channel_names(record),
            "head": record.head,
            "probabilities": "softmax over channels"
            if record.head == "softmax"
            else "1 / (1 + exp(-logit)) of each organ; background's logit is always 0",
            "label_map": "argmax over channels, the first of equals, then `labels`",
        },
        "labels": {"background": 0, **record.label_space.ids},
        "student": origin(record),
    }


def origin(record: StudentRecord) -> dict[str, Any]:
    """Where the student comes from, as far as its own file says it."""
    told = record.model_dump(mode="json")
    names = ("network", "steps", "seed", "supervision", "teachers", "trained_on", "run_digest",
             "validation_dice")  # fmt: skip
    rules = told["postprocessing"]  # of label maps, by `pipeline predict`
    left_out = {"postprocessing_left_out": rules} if rules else {}
    return {name: told[name] for name in names} | left_out


def teacher_entry(record: StudentRecord, *, weights: str) -> dict[str, Any]:
    """An entry for `teachers` of a data_registry.yaml: the file as a teacher of another student."""
    return {
        "kind": "exported",
        "weights": weights,
        "organs": {organ: n for n, organ in enumerate(record.label_space.organs, start=1)},
        "num_channels": len(record.organs) + 1,
        "activation": record.head,
        "spacing_mm": list(record.spacing_mm),
        "orientation": AXCODES,
        "intensity": record.intensity.model_dump(mode="json"),
    }


def _intensity(intensity: Intensity) -> dict[str, Any]:
    low, high = intensity.window_hu
    told: dict[str, Any] = {"window_hu": [low, high]}
    match intensity.kind:
        case "window":
            first, last = intensity.scaled_to
            told |= {"scaled_to": [first, last]}
            how = f"(clip(hu, {low}, {high}) - {low}) * ({last - first} / {high - low}) + {first}"
        case "zscore":
            told |= {"mean_hu": intensity.mean_hu, "std_hu": intensity.std_hu}
            how = f"(clip(hu, {low}, {high}) - {intensity.mean_hu}) / {intensity.std_hu}"
        case "raw":
            told, how = {}, "hu"
    return {"kind": intensity.kind, **told, "formula": how}
