"""Teachers from MONAI bundles: network, preprocessing and inferer are the bundle's own.

The image is written as a NIfTI file, stored as the original was, and loaded by the bundle's
transforms, as its own inference workflow would load the original. The logits stay on the grid that
the bundle's network saw. Postprocessing is not run: the registry says what the channels mean.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.entries import TeacherEntry
from pipeline.data.patches import Index3, WindowConfig
from pipeline.data.volume import Grid, Volume, as_file_array, from_file_array
from pipeline.errors import PipelineError, TeacherError
from pipeline.networks.windows import SlidingWindow, is_out_of_memory
from pipeline.teachers.bundle_config import Parts, innermost, resolve_parts
from pipeline.teachers.bundle_files import contradictions, read_bundle
from pipeline.teachers.outputs import first_output, giving_logits
from pipeline.teachers.teacher import Prediction, load_weights, probed_taps


@dataclass
class BundleTeacher:
    """A bundle's network, run by the bundle's own preprocessing and inferer.

    Attributes:
        taps: tap -> number of channels, and voxels per cell along the network's axes.
    """

    name: str
    parts: Parts
    image_key: str
    taps: Mapping[str, tuple[int, Index3]]
    device: torch.device

    @property
    def spacing_mm(self) -> None:
        """The image's own grid: the bundle resamples by itself."""
        return

    def predict(self, image: Volume) -> Prediction:
        """Int16 HU (D, H, W) in RAS+ -> logits and features on the grid of the bundle's network.

        Raises:
            TeacherError: the bundle's transforms or its network fail, or lose the geometry; or the
                image is one slice, and the inferer's windows are thicker.
        """
        inferer = self.parts.inferer
        if image.grid.slice_axis is not None and hasattr(inferer, "roi_size"):
            window = _window(inferer).shape
            if 1 not in window:
                raise TeacherError(
                    f"the image is one slice, and the inferer's windows have {window} voxels.",
                    where=f"teacher {self.name}",
                    fix="Use a bundle whose `roi_size` is 1 across such slices, or leave them out.",
                )
        array, affine = self._preprocess(image)
        try:
            with torch.inference_mode():
                inputs = array[None].to(self.device, torch.float32)
                out = self._infer(inputs)
        except PipelineError:
            raise
        except Exception as error:
            raise self._failed("inferer", error) from error
        out = first_output(out)
        if not isinstance(out, torch.Tensor) or out.shape[2:] != inputs.shape[2:]:
            what = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise TeacherError(
                f"the inferer gives {what} for an image of {tuple(inputs.shape)}.",
                where=f"teacher {self.name}",
                fix="A bundle that does not give logits of its input's size needs kind `factory`.",
            )
        logits: npt.NDArray[np.float32] = out[0].float().cpu().numpy()
        return Prediction(from_file_array(logits, affine), self._features(array[0], affine))

    def describe(self) -> Mapping[str, Any]:
        """Config and weights are digested as bytes; this is what is ours."""
        says: dict[str, Any] = {"kind": "monai-bundle"}
        if self.taps:
            says["taps"] = {tap: list(stride) for tap, (_, stride) in self.taps.items()}
            says["features"] = "own sliding window, padded with the image's smallest value"
        return says

    def _preprocess(self, image: Volume) -> tuple[torch.Tensor, npt.NDArray[np.float64]]:
        """The image (1, ..) as the network wants it, and the affine of its voxels to RAS+ mm."""
        from monai.data import MetaTensor

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "image.nii"
            array, affine = as_file_array(image, image.stored)
            nib.save(nib.Nifti1Image(array, affine), path)
            try:
                data = self.parts.preprocessing({self.image_key: str(path)})
                found = data[self.image_key]
            except Exception as error:
                raise self._failed("preprocessing", error) from error
        if not isinstance(found, MetaTensor) or found.ndim != 4 or found.shape[0] != 1:
            what = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise TeacherError(
                f"the preprocessing gives {type(found).__name__} {what}, not one 3D image with one "
                "channel and its affine.",
                where=f"teacher {self.name}",
                fix="It must keep MONAI's meta data (`track_meta`) and put the channel first.",
            )
        return found.as_tensor(), np.asarray(found.affine, dtype=np.float64)

    def _infer(self, inputs: torch.Tensor) -> Any:
        """The inferer's answer; fewer windows at a time where memory does not suffice."""
        while True:
            try:
                return self.parts.inferer(inputs, self.parts.network)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                batch_size = getattr(self.parts.inferer, "sw_batch_size", 1)
                if batch_size <= 1:
                    raise TeacherError(
                        "out of memory with one window at a time.",
                        where=f"teacher {self.name}",
                        fix="Free memory of the device, use `--device cpu`, or give the bundle's "
                        "inferer `device: cpu`, where it then puts the windows together.",
                    ) from error
                self.parts.inferer.sw_batch_size = batch_size // 2

    def _features(self, array: torch.Tensor, affine: npt.NDArray[np.float64]) -> dict[str, Volume]:
        if not self.taps:
            return {}
        strides = {tap: stride for tap, (_, stride) in self.taps.items()}
        _, features = SlidingWindow(
            self.parts.network,
            _window(self.parts.inferer),
            strides,
            pad_value=float(array.min()),
            device=self.device,
        ).run(array.float().numpy())
        grid = Grid.from_matrix(array.shape, affine)
        return {
            tap: from_file_array(features[tap], grid.coarsen(stride).matrix)
            for tap, stride in strides.items()
        }

    def _failed(self, what: str, error: Exception) -> PipelineError:
        return TeacherError(
            f"the bundle's {what} failed ({innermost(error)}).",
            where=f"teacher {self.name}",
            fix="Run the bundle by itself on this case to see more.",
        )


def load_bundle_teacher(
    name: str, entry: TeacherEntry, folder: Path, *, device: torch.device
) -> BundleTeacher:
    """Loads a bundle and holds it against the registry.

    Raises:
        TeacherError: files that are absent or damaged, a config that would run code, weights that
            do not fit, a registry that says otherwise than the metadata, or taps that cannot be
            had.
    """
    where = f"teacher {name}, {folder}"
    files = read_bundle(folder, where=where)
    wrong = contradictions(entry, files.metadata)
    if wrong:
        raise TeacherError(
            f"configs/metadata.json and the registry disagree: {'; '.join(wrong)}.",
            where=where,
            fix="Correct `organs` and `num_channels`; if only a name is spelt otherwise, correct "
            "`channel_def` in the bundle's metadata, which enters no digest. A network for other "
            "images than one channel of CT cannot teach.",
        )
    parts = resolve_parts(
        files.config, folder=folder, device=device, trusted=entry.trusted, where=where
    )
    load_weights(parts.network, files.state, "of network_def", where=where)
    parts.network.eval().to(device)
    taps = _taps(entry, parts, where)
    giving_logits(parts.network, entry, where=f"teacher {name}")
    return BundleTeacher(name, parts, files.image_key, taps, device)


def _taps(entry: TeacherEntry, parts: Parts, where: str) -> Mapping[str, tuple[int, Index3]]:
    """Runs one window, where the inferer says how large one is: taps, and that the network runs."""
    if not hasattr(parts.inferer, "roi_size"):
        if entry.taps:
            raise TeacherError(
                f"{type(parts.inferer).__name__} has no windows to take features from.",
                where=where,
                fix="Leave out `taps`, or give the bundle a SlidingWindowInferer.",
            )
        return {}
    return probed_taps(parts.network, entry, _window(parts.inferer).shape, where=where)


def _window(inferer: Any) -> WindowConfig:
    """The inferer's windows, along the network's axes."""
    roi, overlap = inferer.roi_size, inferer.overlap
    sides = (roi,) * 3 if isinstance(roi, int) else tuple(int(n) for n in roi)
    shared = overlap if isinstance(overlap, (int, float)) else max(overlap)
    return WindowConfig(shape=(sides[0], sides[1], sides[2]), overlap=float(shared))
