"""Teachers made by `pipeline train-teachers`: a file of tensors with all that is needed to use it.

The file is a `torch.save` of plain tensors, numbers and text, sealed as students are, and read with
`weights_only=True`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.data.entries import TeacherEntry
from pipeline.data.labels import Intensity, LabelSpace
from pipeline.data.patches import Index3, WindowConfig
from pipeline.data.volume import Spacing, Volume
from pipeline.errors import CheckpointError, TeacherError, named
from pipeline.networks.by_name import NetworkConfig, build_network
from pipeline.networks.tensor_file import load_sealed, save_atomically
from pipeline.networks.windows import Sink, SlidingWindow
from pipeline.teachers.outputs import giving_logits
from pipeline.teachers.teacher import Prediction, load_weights, probed_taps

FORMAT_VERSION = 1


class TeacherRecord(Config):
    """What stands beside the weights in the file."""

    format_version: int = FORMAT_VERSION
    network: NetworkConfig
    num_channels: int
    channels: dict[str, tuple[int, ...]]
    spacing_mm: tuple[float, float, float]
    intensity: Intensity
    validation_dice: dict[str, float | None]
    num_validation_cases: int
    trained_on: str
    trained_on_cases: tuple[str, ...]
    training_digest: str


def save_teacher(path: Path, record: TeacherRecord, state: Mapping[str, Tensor]) -> None:
    """Writes a teacher, sealed and at once: a reader sees the old file or the new."""
    plain = {name: tensor.detach().cpu() for name, tensor in state.items()}
    save_atomically(path, {"record": record.model_dump_json(), "state": plain})


def read_teacher(path: Path, *, student: bool = False) -> tuple[TeacherRecord, dict[str, Tensor]]:
    """Reads a teacher file, or a student.pt as one; those written before files were sealed by the
    checksums of their zip.

    Raises:
        TeacherError: absent, changed since it was written, not a plain tensor file, or not written
            by this program.
    """
    try:
        content = load_sealed(path, unsealed=True)
    except CheckpointError as error:
        raise TeacherError(
            f"the weights cannot be used: {error.what}",
            where=path,
            fix=f"{error.fix} Train or fetch it again. A file that would run code when loaded is "
            "refused, too: save tensors only, or use a teacher of kind `factory`.",
        ) from error
    writer = "pipeline train-student" if student else "pipeline train-teachers"
    try:
        parts = dict(content)
        said = json.loads(parts["record"])
        record = _of_student(said, path) if student else TeacherRecord.model_validate(said)
        state: dict[str, Tensor] = dict(parts["state"])
    except (KeyError, TypeError, ValueError) as error:
        raise TeacherError(
            f"a tensor file, but not one that `{writer}` wrote.",
            where=path,
            fix="Kind `checkpoint` is for teachers, kind `student` for a student.pt, and kind "
            "`factory` for weights from elsewhere.",
        ) from error
    return record, state


def _of_student(said: Mapping[str, Any], path: Path) -> TeacherRecord:
    """A student's record as a teacher's: its channels are background and its organs by id."""
    if said.get("head", "softmax") != "softmax":
        raise TeacherError(
            "a student of kind masked_bce: its organs do not compete with a background.",
            where=path,
            fix="Teach with a student of another kind of supervision.",
        )
    organs = LabelSpace(said["organs"]).organs
    return TeacherRecord(
        network=said["network"],
        num_channels=len(organs) + 1,
        channels={organ: (k + 1,) for k, organ in enumerate(organs)},
        spacing_mm=said["spacing_mm"],
        intensity=said["intensity"],
        validation_dice=said["validation_dice"],
        num_validation_cases=0,
        trained_on="",
        trained_on_cases=said["trained_on"],
        training_digest=said["run_digest"],
    )


@dataclass
class CheckpointTeacher:
    """A MONAI network with its own spacing and intensities, run by sliding window."""

    record: TeacherRecord
    network: nn.Module
    window: WindowConfig
    taps: Mapping[str, tuple[int, Index3]]
    batch_size: int
    device: torch.device

    @property
    def spacing_mm(self) -> Spacing:
        """The spacing that it was trained at."""
        return self.record.spacing_mm

    def predict(self, image: Volume) -> Prediction:
        """Int16 HU (D, H, W) at `spacing_mm` -> logits on the same grid and tapped features."""
        logits, features = self._windows.run(image.array)
        on_grid = {
            tap: Volume(features[tap], image.grid.coarsen(stride))
            for tap, stride in self.strides.items()
        }
        return Prediction(Volume(logits, image.grid), on_grid)

    @property
    def strides(self) -> Mapping[str, Index3]:
        """Per tap, voxels per feature cell."""
        return {tap: stride for tap, (_, stride) in self.taps.items()}

    def stream(self, image: Volume, *, logits: Sink, features: Mapping[str, Sink]) -> None:
        """`predict`, slab by slab; see `StreamingTeacher`."""
        self._windows.stream(image.array, logits, features)

    @property
    def _windows(self) -> SlidingWindow:
        intensity = self.record.intensity
        return SlidingWindow(
            self.network, self.window, self.strides, pad_value=intensity.air,
            batch_size=self.batch_size, device=self.device, scale=intensity.apply,
        )  # fmt: skip

    def describe(self) -> Mapping[str, Any]:
        """Record, window and taps."""
        return {
            "kind": "checkpoint",
            "network": self.record.network.model_dump(mode="json"),
            "spacing_mm": list(self.record.spacing_mm),
            "intensity": self.record.intensity.model_dump(mode="json"),
            "window": self.window.model_dump(mode="json"),
            "blending": "gaussian, channel logits, float32",
            "taps": {tap: list(stride) for tap, (_, stride) in self.taps.items()},
        }


def load_checkpoint_teacher(
    name: str,
    entry: TeacherEntry,
    path: Path,
    *,
    window: WindowConfig,
    batch_size: int,
    device: torch.device,
) -> CheckpointTeacher:
    """Loads a teacher and holds its file against the registry.

    Raises:
        TeacherError: weights that do not fit the network, a registry that says otherwise than
            the file about channels, spacing or intensities, or a window or tap that the network
            cannot have.
    """
    record, state = read_teacher(path, student=entry.kind == "student")
    _check_against(name, entry, record, path)
    where = f"teacher {name}, {path}"
    with named(where):
        network = build_network(record.network, in_channels=1, out_channels=record.num_channels)
    load_weights(network, state, record.network.name, where=where)
    network.eval().to(device)
    taps = probed_taps(network, entry, window.shape, where=where)
    network = giving_logits(network, entry, where=f"teacher {name}")
    return CheckpointTeacher(record, network, window, taps, batch_size, device)


def _check_against(name: str, entry: TeacherEntry, record: TeacherRecord, path: Path) -> None:
    said: list[tuple[str, Any, Any]] = [
        ("num_channels", entry.num_channels, record.num_channels),
        *((f"organs.{o}", c, record.channels.get(o)) for o, c in entry.organs.items()),
        ("intensity", entry.intensity, record.intensity),
    ]
    if entry.spacing_mm is not None and not np.allclose(entry.spacing_mm, record.spacing_mm):
        said.append(("spacing_mm", entry.spacing_mm, record.spacing_mm))
    wrong = [
        f"{key} is {theirs} in the file but {ours} in the registry"
        for key, ours, theirs in said
        if ours is not None and ours != theirs
    ]
    if wrong:
        raise TeacherError(
            f"{'; '.join(wrong)}.",
            where=f"teacher {name}, {path}",
            fix="Correct the registry, or train the teacher again.",
        )
