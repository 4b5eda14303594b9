"""What a program must know to use an exported student as `pipeline predict` does, as JSON; and what
people read in a bundle."""

from __future__ import annotations

from typing import Any

import yaml

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
    """All that lies between a CT and its label map, as plain JSON values."""
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


def trained_on_datasets(record: StudentRecord) -> list[str]:
    """Names of the datasets whose cases the student was trained on."""
    return list(dict.fromkeys(case.split("/")[0] for case in record.trained_on))


def bundle_channels(record: StudentRecord) -> list[str]:
    """Of the bundle's network: MONAI's own has no channel that is always 0."""
    return channel_names(record) if record.head == "softmax" else list(record.label_space.organs)


def bundle_entry(record: StudentRecord, *, folder: str) -> dict[str, Any]:
    """An entry for `teachers` of a data_registry.yaml: the bundle as another student's teacher."""
    names = bundle_channels(record)
    return {
        "kind": "monai-bundle",
        "weights": folder,
        "organs": {organ: names.index(organ) for organ in record.label_space.organs},
        "num_channels": len(names),
        "activation": record.head,
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


# What people read in a bundle: docs/README.md and LICENSE.


def readme(record: StudentRecord, name: str) -> str:
    """`docs/README.md`."""
    labels = "\n".join(f"| {i} | {organ} |" for organ, i in record.label_space.ids.items())
    entry = bundle_entry(record, folder="path/to/this/bundle")
    entry_text = yaml.safe_dump({name: entry}, sort_keys=False).rstrip()
    spacing = " x ".join(f"{mm:g}" for mm in record.spacing_mm)
    patch = " x ".join(map(str, record.patch))
    channels = bundle_channels(record)
    left_out = (
        "\n`pipeline predict` also removes parts of organs that are too small, as "
        "`postprocessing_left_out` in metadata.json says; this bundle does not.\n"
        if record.postprocessing
        else ""
    )
    dice = "\n".join(
        f"| {organ} | {'-' if value is None else f'{value:.3f}'} |"
        for organ, value in record.validation_dice.items()
    )
    return f"""# {name}

A {record.network.name} for CT that finds {", ".join(record.label_space.organs)}. Exported by
organ-distill from a student that was trained for {record.steps} steps. Research only.

## Run it

```sh
pip install monai nibabel pytorch-ignite fire
python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json \\
  --bundle_root . --dataset_dir /path/to/nifti/files --output_dir /path/to/labels
```

Each NIfTI file of a CT gives a label map of its name, on its own grid:

| value | organ |
| --- | --- |
| 0 | background |
{labels}

The network sees arrays whose axes point to superior, anterior and right, at {spacing} mm, in
windows of {patch} voxels. `models/model.pt` holds its weights, `models/model.ts` the same network
as TorchScript for windows of that size. Its {len(channels)} channels are logits ({record.head}):
{", ".join(channels)}.
{left_out}
`export.json` says how far the label maps that MONAI made by this bundle were from those of the
student itself, on one image: on the student's grid they are the same; on others MONAI resamples a
little differently from `pipeline predict`.

Best validation Dice while it was trained:

| organ | Dice |
| --- | --- |
{dice or "| - | - |"}

## Check it

```sh
python -m monai.bundle verify_net_in_out --net_id network_def \\
  --meta_file configs/metadata.json --config_file configs/inference.json
python -m monai.bundle verify_metadata --meta_file configs/metadata.json --filepath schema.json
```

The second fetches MONAI's schema unless `schema.json` is there already.

## As a teacher of another student

In a `data_registry.yaml` of organ-distill, under `teachers`:

```yaml
{entry_text}
```
"""


def licence(record: StudentRecord) -> str:
    """`LICENSE`: that nobody has chosen one yet, and whose terms to look at."""
    teachers = "\n".join(f"  - {name} ({digest[:16]})" for name, digest in record.teachers.items())
    datasets = "\n".join(f"  - {name}" for name in trained_on_datasets(record))
    return f"""No licence has been chosen for these weights yet: put one here before passing on.

They were learnt from teachers and datasets whose own terms may bind them, for example to research.
Teachers, with the first digits of what was digested of them:
{teachers or "  - none recorded"}
Datasets:
{datasets or "  - none recorded"}

The configuration files of this bundle were generated by organ-distill and may be used freely.
"""
