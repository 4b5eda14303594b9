"""The student's network: a MONAI network by name, one tapped layer, one adapter per cached tap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.network import (
    NetworkConfig,
    build_network,
    find_module,
    output_shapes,
    tap_shapes,
)
from pipeline.patches import Index3
from pipeline.student.deep_supervision import Outputs, check_outputs

TapKey = tuple[str, str]


@dataclass(frozen=True)
class CachedTap:
    """A tap in the cache.

    Attributes:
        channels: F.
        stride: student-grid voxels per cell along z, y, x.
        organs: numbers of the organs that its teacher is expert in.
    """

    channels: int
    stride: Index3
    organs: tuple[int, ...]


class StudentNetwork(nn.Module):
    """Network and adapters. Only `network` is what a trained student consists of.

    Raises:
        ConfigError: no such network or layer, no network for segmentation, a patch that it cannot
            take, a layer whose cells are not those of a cached tap, or deep supervision of a
            network that has one output.
    """

    def __init__(
        self,
        config: NetworkConfig,
        num_organs: int,
        *,
        patch: Sequence[int],
        tap: str = "",
        cached: Mapping[TapKey, CachedTap] | None = None,
        deep_supervision: bool | None = None,
    ) -> None:
        super().__init__()
        self.network = build_network(config, in_channels=1, out_channels=num_organs + 1)
        shapes_out = output_shapes(self.network, patch)
        check_outputs(config, shapes_out, (num_organs + 1, *patch), deep_supervision)
        self.deep_supervision = deep_supervision is not False
        self.cached = dict(cached or {})
        self.tap_stride: Index3 = (1, 1, 1)
        self._feature: Tensor | None = None
        self.adapters = nn.ModuleList()
        if tap:
            channels, stride = tap_shapes(self.network, [tap], patch)[tap]
        if tap and self.cached:
            self.tap_stride = stride
            self._check_strides(tap)
            for entry in self.cached.values():
                self.adapters.append(nn.Conv3d(channels, entry.channels, kernel_size=1))
            find_module(self.network, tap).register_forward_hook(self._keep)

    def forward(self, image: Tensor) -> tuple[Outputs, Tensor | None]:
        """(N, 1, D, H, W) -> logits (N, K + 1, D, H, W), and the tapped feature or None.

        Under deep supervision, while training, a tuple of logits, the full-size ones first.
        """
        outputs: Outputs = self.network(image)
        feature, self._feature = self._feature, None
        if isinstance(outputs, tuple) and not self.deep_supervision:
            outputs = outputs[0]
        return outputs, feature

    def adapt(self, key: TapKey, feature: Tensor) -> Tensor:
        """The student's feature projected to the channels of a cached tap."""
        adapted: Tensor = self.adapters[list(self.cached).index(key)](feature)
        return adapted

    def organs_of(self, key: TapKey) -> list[int]:
        """Numbers of the organs that the teacher of a cached tap is expert in."""
        return list(self.cached[key].organs)

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._feature = output

    def _check_strides(self, tap: str) -> None:
        for (teacher, name), entry in self.cached.items():
            if entry.stride != self.tap_stride:
                raise ConfigError(
                    f"layer {tap!r} of the student has cells of {self.tap_stride} voxels, tap "
                    f"{name!r} of teacher {teacher} is cached in cells of {entry.stride}.",
                    where="supervision.features.student_tap",
                    fix="Choose a layer of the student with the same stride, or re-cache that "
                    "teacher with another tap.",
                )


def seeded_network(
    config: NetworkConfig,
    num_organs: int,
    *,
    seed: int,
    patch: Sequence[int],
    tap: str = "",
    cached: Mapping[TapKey, CachedTap] | None = None,
    deep_supervision: bool | None = None,
) -> StudentNetwork:
    """A student whose first weights depend on the seed alone, whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StudentNetwork(
            config,
            num_organs,
            patch=patch,
            tap=tap,
            cached=cached,
            deep_supervision=deep_supervision,
        )
