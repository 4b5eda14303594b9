"""A student as a MONAI bundle: MONAI runs it, and this project takes it as a teacher."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.nifti import read_image, read_label, write_image
from pipeline.data.resample import resample, same_grid
from pipeline.errors import ConfigError
from pipeline.exporting.bundle_config import (
    bundle_channels,
    inference_config,
    metadata,
    network_def,
)
from pipeline.exporting.bundle_texts import licence, readme
from pipeline.exporting.networks import as_bytes, quiet, write_network
from pipeline.exporting.parity import CPU, LabelCount, Parity, ParityError
from pipeline.student.checkpoint import StudentRecord
from pipeline.student.network import OneVsRest
from pipeline.student.segmentation import segment

WEIGHTS = Path("models") / "model.pt"
SCRIPTED = Path("models") / "model.ts"
ON_STUDENT_GRID = "run by MONAI on the student grid"
ON_OWN_GRID = "run by MONAI on the image's own grid"
_SAME_PLACE_MM = 0.01
_OTHER_MONAI = (
    "Use another --format, or another version of MONAI: `pipeline info` says which is there."
)


def write_bundle(
    folder: Path, record: StudentRecord, network: nn.Module, *, name: str, overlap: float
) -> None:
    """Writes configs, weights, TorchScript, README and LICENSE.

    Args:
        folder: of the bundle, empty.
        record: of the student.
        network: the student's, on the CPU, in evaluation mode.
        name: of the bundle.
        overlap: fraction that neighbouring windows share.

    Raises:
        ConfigError: MONAI's own network gives something else than one tensor.
    """
    plain = network.organs if isinstance(network, OneVsRest) else network
    _check_plain(record, plain)
    for part in ("configs", "models", "docs"):
        (folder / part).mkdir(parents=True)
    _write(folder / "configs" / "inference.json", inference_config(record, overlap=overlap))
    _write(folder / "configs" / "metadata.json", metadata(record, name=name))
    (folder / WEIGHTS).write_bytes(as_bytes(torch.save, plain.state_dict()))
    write_network(folder / SCRIPTED, plain, record.patch, "torchscript", opset=0)
    (folder / "docs" / "README.md").write_text(readme(record, name), encoding="utf-8")
    (folder / "LICENSE").write_text(licence(record), encoding="utf-8")


def all_channels(record: StudentRecord, network: nn.Module) -> nn.Module:
    """A bundle's network with the channels of the student's."""
    return OneVsRest(network) if record.head == "sigmoid" else network


def run_bundle(folder: Path, image: Path, output: Path) -> Path:
    """Runs a bundle on an image on the CPU by MONAI's own transforms and inferer.

    It does what `python -m monai.bundle run` does, but for ignite's loop over images.

    Args:
        folder: of the bundle, which is trusted: postprocessing is code.
        image: NIfTI.
        output: folder of label maps.

    Returns:
        The label map.

    Raises:
        ParityError: no label map came of it.
    """
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(folder / "configs" / "inference.json")
    parser.read_meta(folder / "configs" / "metadata.json")
    parser["bundle_root"], parser["output_dir"] = str(folder), str(output)
    parser["device"] = "$torch.device('cpu')"
    with quiet():
        parts = {
            name: parser.get_parsed_content(name)
            for name in ("network", "preprocessing", "inferer", "postprocessing")
        }
        network: nn.Module = parts["network"]
        network.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True), strict=True)
        data: dict[str, Any] = parts["preprocessing"]({"image": str(image)})
        with torch.inference_mode():
            data["pred"] = parts["inferer"](data["image"][None], network.eval())[0]
        parts["postprocessing"](data)
    written = sorted(output.glob("*.nii.gz"))
    if len(written) != 1:
        raise ParityError(
            f"MONAI wrote {len(written)} label maps of one image.", where=folder, fix=_OTHER_MONAI
        )
    return written[0]


def compare_bundle(
    folder: Path, image: Path, record: StudentRecord, network: nn.Module, *, overlap: float
) -> dict[str, Parity]:
    """Label maps that MONAI makes by the bundle, against those of the student.

    On an image that is resampled to the student grid beforehand they can only be equal. On the
    image itself, where that is another, MONAI resamples in its own way.

    Args:
        folder: of the bundle.
        image: NIfTI.
        record: of the student.
        network: the student's.
        overlap: fraction that neighbouring windows share.

    Returns:
        `ON_STUDENT_GRID`, and if the image has another grid `ON_OWN_GRID`.

    Raises:
        ParityError: MONAI's label map lies elsewhere than the image.
    """
    volume = read_image(image).volume
    grid = volume.grid.with_spacing(record.spacing_mm)
    with TemporaryDirectory(prefix="organ-distill-") as scratch:
        resampled = Path(scratch) / "image.nii"
        write_image(resampled, resample(volume, grid, order=1))
        compare = partial(
            _compare_on, folder, record, network, overlap=overlap, scratch=Path(scratch)
        )
        found = {ON_STUDENT_GRID: compare(resampled)}
        if not same_grid(volume.grid, grid):
            found[ON_OWN_GRID] = compare(image)
    return found


def _compare_on(
    folder: Path,
    record: StudentRecord,
    network: nn.Module,
    image: Path,
    *,
    overlap: float,
    scratch: Path,
) -> Parity:
    volume = read_image(image).volume
    ours = segment(volume, record, network, overlap=overlap, device=CPU)
    with TemporaryDirectory(dir=scratch) as output:
        theirs = read_label(run_bundle(folder, image, Path(output))).volume
    apart = float("inf")
    if theirs.grid.shape == volume.grid.shape:
        apart = theirs.grid.largest_corner_distance_mm(volume.grid)
    if not apart < _SAME_PLACE_MM:
        raise ParityError(
            f"MONAI's label map has {theirs.grid.shape} voxels and lies {apart:.3g} mm beside the "
            f"image's {volume.grid.shape}.",
            where=folder,
            fix=_OTHER_MONAI,
        )
    count = LabelCount(record)
    count.add(ours, record.label_space.to_classes(theirs.array.astype(np.uint8)))
    return count.parity()


def _check_plain(record: StudentRecord, network: nn.Module) -> None:
    """Whether MONAI's network alone gives one tensor: what makes it so here is no part of it."""
    from monai.networks import nets

    arguments = {k: v for k, v in network_def(record).items() if k != "_target_"}
    bare: nn.Module = getattr(nets, record.network.name)(**arguments)
    bare.load_state_dict(network.state_dict(), strict=True)
    with torch.inference_mode():
        out = bare.eval()(torch.zeros(1, 1, *record.patch))
    if not isinstance(out, Tensor) or out.shape[1:] != (
        len(bundle_channels(record)), *record.patch
    ):  # fmt: skip
        what = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ConfigError(
            f"{record.network.name} gives {what}, not one tensor of full-size logits, so MONAI's "
            "inferers cannot use it.",
            where="--format bundle",
            fix="Export it as torchscript, torch-export or onnx.",
        )


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
