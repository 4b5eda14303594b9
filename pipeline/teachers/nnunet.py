"""Teachers that are trained nnU-Net v2 model folders, run by nnU-Net's own code.

nnU-Net prepares the image (crop to non-zero, normalisation, resampling to the plans' spacing) and
runs its own predictor. What is left to this module is where things are: nnU-Net works on arrays in
the order that its image reader gives, and its logits are taken on the grid that it prepared, so
that they are resampled once, onto the student grid, and never onto the CT's own grid, which is
what fills nnU-Net's memory on long scans (MIC-DKFZ/nnUNet #1765).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.errors import TeacherError
from pipeline.teacher_entry import NnunetOptions
from pipeline.teachers.teacher import Prediction
from pipeline.volume import Grid, Orientation, Volume


@dataclass
class NnunetTeacher:
    """A model folder, ready to run.

    Attributes:
        name: of the teacher, for errors.
        options: how the folder is used.
        orientation: `stored` or letters, with the model's own reader taken into account.
        folds: which are averaged.
        trainer: class name of its trainer.
        configuration_name: which of the plans' configurations it is.
        version: of nnU-Net.
        predictor: nnU-Net's, with network and weights.
    """

    name: str
    options: NnunetOptions
    orientation: str
    folds: tuple[str, ...]
    trainer: str
    configuration_name: str
    version: str
    predictor: Any

    @property
    def spacing_mm(self) -> None:
        """None: nnU-Net resamples the image itself."""
        return

    def predict(self, image: Volume) -> Prediction:
        """Int16 HU (D, H, W) in RAS+, on its own grid -> logits where nnU-Net computes them.

        Raises:
            TeacherError: nnU-Net could not sum the logits in half precision.
        """
        plans, configuration = self.predictor.plans_manager, self.predictor.configuration_manager
        orientation = self._orientation(image)
        seen = orientation.apply(image)
        properties: dict[str, Any] = {"spacing": file_spacing(seen.grid)}
        preprocessor = configuration.preprocessor_class(verbose=False)
        prepared, _, properties = preprocessor.run_case_npy(
            # In memory as nnU-Net's readers leave it, so that its sums come to the same.
            np.ascontiguousarray(seen.array)[None],
            None,
            properties,
            plans,
            configuration,
            self.predictor.dataset_json,
        )
        try:
            logits = self.predictor.predict_logits_from_preprocessed_data(
                torch.from_numpy(np.ascontiguousarray(prepared))
            )
        except RuntimeError as error:
            if "Encountered inf" not in str(error):
                raise
            raise TeacherError(
                "nnU-Net's sums of logits overflow in half precision.",
                where=f"teacher {self.name}",
                fix="Look at this case's intensities; nothing was cached for it.",
            ) from error
        transposed = Orientation(axes=_triple(plans.transpose_forward))
        grid = prepared_grid(transposed.apply(seen).grid, properties, prepared.shape[1:])
        on_grid = Volume(logits.float().numpy(), grid)
        return Prediction(orientation.undo(transposed.undo(on_grid)))

    def describe(self) -> Mapping[str, Any]:
        """Folds, configuration and settings; the plans are digested with the weights."""
        mirrored = self.predictor.allowed_mirroring_axes if self.options.mirroring else None
        return {
            "kind": "nnunet",
            "nnunetv2": self.version,
            "configuration": self.configuration_name,
            "trainer": self.trainer,
            "folds": list(self.folds),
            "checkpoint": self.options.checkpoint,
            "mirror_axes": list(mirrored or ()),
            "tile_step": self.options.tile_step,
            "orientation": self.orientation,
            "blending": "nnU-Net's: gaussian, channel logits, float16; folds averaged",
        }

    def _orientation(self, image: Volume) -> Orientation:
        if self.orientation == "stored":
            return image.stored
        return Orientation.from_code(self.orientation)


def file_spacing(grid: Grid) -> list[float]:
    """The spacing in mm as a NIfTI header holds it, in single precision: nnU-Net rounds sizes, and
    a half must not fall to another side than it does for nnU-Net's own readers."""
    return [float(np.float32(mm)) for mm in grid.spacing_mm]


def prepared_grid(grid: Grid, properties: Mapping[str, Any], shape: tuple[int, ...]) -> Grid:
    """Where the voxels lie that nnU-Net prepared.

    It crops, then resizes edge to edge: all of its resampling functions keep the outer faces of the
    first and the last voxel in place, whatever the spacing then comes to.

    Args:
        grid: of the image, axes as nnU-Net transposes them.
        properties: what its preprocessor noted: `bbox_used_for_cropping`.
        shape: of the array that it made, without channels.
    """
    box = properties["bbox_used_for_cropping"]
    cropped = grid.crop([begin for begin, _ in box], [end - begin for begin, end in box])
    return cropped.with_shape(shape)


def _triple(axes: Any) -> tuple[int, int, int]:
    a, b, c = (int(axis) for axis in axes)
    return a, b, c
