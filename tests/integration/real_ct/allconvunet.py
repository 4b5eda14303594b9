"""A teacher from the wild: an all-convolutional 3D U-Net (Heinrich, Oktay, Bouteldja 2019).

The network was trained by others on TCIA Pancreas-CT. It wants a preprocessing of its own and
emits several organs at once, so it is reached by naming a factory in the registry:

    factory: "tests.integration.real_ct.allconvunet:load"

Output channels: 0 background, 1 spleen, 2 pancreas, 3 left kidney, 4 gallbladder, 5 oesophagus,
6 liver, 7 stomach, 8 duodenum.

Axes: this project's volumes are (D, H, W) = z, y, x; the network's are x, y, z, with the first and
the third mirrored. `_to_network` and `_from_network` are the only places that know it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.ndimage import affine_transform
from torch import Tensor, nn

from pipeline.data.volume import Grid, Index3, Spacing, Volume
from pipeline.teachers.teacher import Prediction

VERSION = 1
GRID_SHAPE: Index3 = (144, 144, 144)
BOX_MM: Spacing = (150.0, 225.0, 320.0)
BODY_HU = -300
AIR_HU = -1024.0
NUM_CHANNELS = 9
# Along z, y, x: does the network see this axis mirrored?
MIRRORED = (True, False, True)

# name: channels in, channels out, stride
_BLOCKS = {
    "0": (1, 5, 1),
    "1": (5, 14, 2),
    "11": (14, 14, 1),
    "2": (14, 28, 2),
    "22": (28, 28, 1),
    "3": (28, 42, 2),
    "33": (42, 42, 1),
    "4": (42, 56, 2),
    "44": (56, 56, 1),
    "5": (56, 70, 2),
    "55": (70, 70, 1),
    "6dU": (126, 56, 1),
    "6cU": (98, 42, 1),
    "6bU": (70, 28, 1),
    "6U": (42, 14, 1),
    "7U": (19, 9, 1),
}


class AllConvUNet(nn.Module):
    """The network. Input (N, 1, X, Y, Z) raw HU; output (N, 9, X, Y, Z) logits."""

    def __init__(self) -> None:
        super().__init__()
        for name, (num_in, num_out, stride) in _BLOCKS.items():
            self.add_module(f"conv{name}", nn.Conv3d(num_in, num_out, 3, stride, padding=1))
            self.add_module(f"batch{name}", nn.BatchNorm3d(num_out))
        self.conv77U = nn.Conv3d(NUM_CHANNELS, NUM_CHANNELS, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Encoder with five halvings, decoder with a skip at each."""
        skip0 = self._block("0", image)
        skip1 = self._block("11", self._block("1", skip0))
        skip2 = self._block("22", self._block("2", skip1))
        skip3 = self._block("33", self._block("3", skip2))
        skip4 = self._block("44", self._block("4", skip3))
        x = self._block("55", self._block("5", skip4))
        x = self._block("6dU", _join(x, skip4))
        x = self._block("6cU", _join(x, skip3))
        x = self._block("6bU", _join(x, skip2))
        x = self._block("6U", _join(x, skip1))
        x = self._block("7U", _join(x, skip0))
        logits: Tensor = self.conv77U(x)
        return logits

    def _block(self, name: str, x: Tensor) -> Tensor:
        x = self.get_submodule(f"batch{name}")(self.get_submodule(f"conv{name}")(x))
        return F.leaky_relu(x, 0.1)


def _join(x: Tensor, skip: Tensor) -> Tensor:
    size = list(skip.shape[2:])
    resized = F.interpolate(x, size=size, mode="trilinear", align_corners=False)
    return torch.cat([resized, skip], dim=1)


class AllConvTeacher:
    """The network with its own preprocessing.

    Args:
        network: in inference mode, on `device`.
        taps: names of modules of the network whose outputs are kept as features.
        device: where the network runs.
    """

    def __init__(self, network: AllConvUNet, *, taps: Sequence[str], device: str) -> None:
        self.network = network
        self.taps = tuple(taps)
        self.device = torch.device(device)

    def predict(self, image: Volume) -> Prediction:
        """Logits and features of one CT.

        Args:
            image: (D, H, W) int16 HU in RAS+ at its native resolution.

        Returns:
            logits (9, 144, 144, 144) float32 on the grid of the abdominal box, which may reach
            beyond the image; features (F, d, h, w) float32, each on its own coarse grid.
        """
        grid = self.box_grid(image)
        boxed = torch.from_numpy(_resample(image, grid)).to(self.device)
        kept: dict[str, Tensor] = {}
        handles = [self._keep_output(tap, kept) for tap in self.taps]
        try:
            with torch.inference_mode():
                logits = self.network(_to_network(boxed)[None, None])[0]
        finally:
            for handle in handles:
                handle.remove()
        features = {tap: _feature_volume(kept.pop(tap), grid) for tap in self.taps}
        return Prediction(logits=Volume(_from_network(logits), grid), features=features)

    def box_grid(self, image: Volume) -> Grid:
        """The network's grid for this image: 144 voxels a side over the abdominal box.

        The box runs along the image's own axes. Its top face is the top face of the field of view;
        left-right and front-back it is centred on the body's centre of mass (voxels above -300 HU
        in the uppermost 150 mm), or on the field of view where there is no body.
        """
        spacing = np.array(image.spacing_mm)
        size = np.array(image.grid.shape)
        box = np.array(BOX_MM) / spacing  # in voxels of the image
        num_slices = int(min(np.ceil(box[0]), size[0]))
        middle = _body_centre(image.array[size[0] - num_slices :])
        top_face = size[0] - 0.5  # voxel i covers i - .5 .. i + .5
        low_face = np.array([top_face - box[0], *(middle - box[1:] / 2)])
        step = box / GRID_SHAPE
        matrix = image.grid.matrix
        matrix[:3, 3] += matrix[:3, :3] @ (low_face + step / 2)
        matrix[:3, :3] *= step
        return Grid.from_matrix(GRID_SHAPE, matrix)

    def describe(self) -> dict[str, Any]:
        """Everything that changes the numbers, besides the weights."""
        return {
            "architecture": "AllConvUNet",
            "version": VERSION,
            "box_mm": list(BOX_MM),
            "box_rule": f"top of field of view; centre of mass above {BODY_HU} HU",
            "grid": list(GRID_SHAPE),
            "network_axes": "xyz",
            "flips": [axis for axis, mirrored in zip("zyx", MIRRORED, strict=True) if mirrored],
            "intensity": f"raw HU, {AIR_HU:g} outside the field of view",
            "interpolation": "trilinear",
            "dtype": "float32",
            "taps": list(self.taps),
        }

    def _keep_output(self, tap: str, kept: dict[str, Tensor]) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            kept[tap] = output[0]

        return self.network.get_submodule(tap).register_forward_hook(hook)


def load(weights: Path, *, taps: Sequence[str] = (), device: str = "cpu") -> AllConvTeacher:
    """The factory that a registry names.

    Args:
        weights: `.npz` of plain arrays named like the network's modules.
        taps: modules to read features from, such as "conv33" (before its norm) or "batch33".
        device: a torch device.
    """
    network = AllConvUNet()
    with np.load(weights, allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(file[name].astype(np.float32)) for name in file.files}
    # Batch norm fills in its counter of training steps itself; it plays no part in inference.
    network.load_state_dict(arrays, strict=True)
    return AllConvTeacher(network.eval().to(device), taps=taps, device=device)


def _body_centre(slab: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Centre of mass (y, x), in voxels, of what is denser than air, fat included."""
    per_column = np.count_nonzero(slab > BODY_HU, axis=0)
    num_body = per_column.sum()
    if num_body == 0:
        y, x = ((n - 1) / 2 for n in per_column.shape)
    else:
        y = per_column.sum(axis=1) @ np.arange(per_column.shape[0]) / num_body
        x = per_column.sum(axis=0) @ np.arange(per_column.shape[1]) / num_body
    return np.array([y, x], dtype=np.float64)


def _resample(image: Volume, grid: Grid) -> npt.NDArray[np.float32]:
    """The image on `grid`, trilinear; air beyond the field of view.

    `grid` runs along the image's axes, so the map between the two is one scale and shift per axis.
    """
    index_map = image.grid.index_map_from(grid)
    step, first = np.diag(index_map)[:3], index_map[:3, 3]
    boxed: npt.NDArray[np.float32] = affine_transform(
        image.array,
        np.diag(step),
        offset=first,
        output_shape=grid.shape,
        output=np.float32,
        order=1,
        mode="nearest",
    )
    for axis, num_voxels in enumerate(image.grid.shape):
        position = first[axis] + step[axis] * np.arange(grid.shape[axis])
        outside = (position < -0.5) | (position > num_voxels - 0.5)
        np.moveaxis(boxed, axis, 0)[outside] = AIR_HU
    return boxed


def _to_network(array: Tensor) -> Tensor:
    """(.., z, y, x) in RAS+ to the network's (.., x, y, z), mirrored as it wants."""
    return array.flip(_mirrored_dims()).transpose(-3, -1).contiguous()


def _from_network(tensor: Tensor) -> npt.NDArray[np.float32]:
    """The inverse of `_to_network`, as a float32 array."""
    array = tensor.transpose(-3, -1).flip(_mirrored_dims())
    return np.ascontiguousarray(array.float().cpu().numpy())


def _mirrored_dims() -> list[int]:
    return [axis - 3 for axis, mirrored in enumerate(MIRRORED) if mirrored]


def _feature_volume(feature: Tensor, grid: Grid) -> Volume:
    """A module's output (F, x, y, z) in this project's axes, on its coarse grid.

    A cell's place is the centre of its receptive field. Each stride-2 convolution of kernel 3 and
    padding 1 looks at voxels 2j - 1 .. 2j + 1, so cell j of a layer of stride s is centred on voxel
    s * j of the network's axis (not on the middle of a block of s voxels). Along a mirrored axis
    the cells count from the other end: the LAST cell, here, is centred on the last voxel.
    """
    array = _from_network(feature)
    # 144 halves to 72, 36, 18, 9 and 5: the number of cells, rounded up, tells the stride.
    stride = [2 ** round(np.log2(n / c)) for n, c in zip(grid.shape, array.shape[1:], strict=True)]
    first = [
        (n - 1) - s * (c - 1) if mirrored else 0
        for n, c, s, mirrored in zip(grid.shape, array.shape[1:], stride, MIRRORED, strict=True)
    ]
    matrix = grid.matrix
    matrix[:3, 3] += matrix[:3, :3] @ np.array(first, dtype=np.float64)
    matrix[:3, :3] *= stride
    return Volume(array, Grid.from_matrix(array.shape[1:], matrix))
