"""The student's network: a MONAI network by name, tapped layers, one adapter per cached tap,
outputs for deep supervision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.patches import Index3
from pipeline.errors import ConfigError
from pipeline.networks.by_name import (
    NetworkConfig,
    build_network,
    find_module,
    output_shapes,
    tap_shapes,
)

if TYPE_CHECKING:
    from pipeline.student.settings import TrainingConfig

TapKey = tuple[str, str]
Head = Literal["softmax", "sigmoid"]
# Layers, each for all cached taps of its stride; or cached tap -> layer.
StudentTaps = Mapping[str, str] | Sequence[str]
_WHERE = "supervision.features.student_taps"


@dataclass(frozen=True)
class CachedTap:
    """A tap in the cache.

    Attributes:
        channels: F.
        stride: student-grid voxels per cell along z, y, x.
        organs: numbers of the organs that its teacher is expert in.
        mean: of each channel over the training cases; none: 0.
        std: likewise; 0 is that of a channel that says nothing.
    """

    channels: int
    stride: Index3
    organs: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def standardised(self, cells: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """(F, d, h, w) with mean 0 and standard deviation 1 over the training cases."""
        if not self.mean:
            return cells
        moments = np.array([self.mean, self.std], dtype=np.float32)
        mean, std = moments[..., None, None, None]
        found: npt.NDArray[np.float32] = (cells - mean) / np.where(std > 0, std, 1)
        return found


class OneVsRest(nn.Module):
    """A network with one sigmoid channel per organ as one with K + 1 logits: background's is 0.

    So argmax is the prediction as it is with a softmax: the organ of the largest logit, background
    where all are negative. Validation, prediction and export need not know the difference.
    """

    def __init__(self, organs: nn.Module) -> None:
        super().__init__()
        self.organs = organs

    def forward(self, image: Tensor) -> Outputs:
        """(N, 1, D, H, W) -> (N, K + 1, D, H, W); of several outputs each so."""
        out = self.organs(image)
        if isinstance(out, tuple):
            return tuple(_with_background(o) for o in out)
        return _with_background(out)


def build_student(config: NetworkConfig, num_organs: int, head: Head) -> nn.Module:
    """A network with K + 1 logits, background first; weights from torch's global random state.

    Raises:
        ConfigError: no such network, or arguments that it does not take.
    """
    if head == "sigmoid":
        return OneVsRest(build_network(config, in_channels=1, out_channels=num_organs))
    return build_network(config, in_channels=1, out_channels=num_organs + 1)


class StudentNetwork(nn.Module):
    """Network and adapters. Only `network` is what a trained student consists of.

    Attributes:
        network: (N, 1, D, H, W) -> logits.
        layer_of: the layer of the student that each of them is compared with.

    Raises:
        ConfigError: no such network or layer, no network for segmentation, a patch that it cannot
            take, layers and cached taps that cannot be paired, or deep supervision of a network
            that has one output.
    """

    def __init__(
        self,
        config: TrainingConfig,
        num_organs: int,
        cached: Mapping[TapKey, CachedTap] | None = None,
    ) -> None:
        super().__init__()
        supervision, patch = config.supervision, config.patch
        taps: StudentTaps = supervision.features.student_taps if supervision.uses_features else ()
        self.network = build_student(config.network, num_organs, supervision.head)
        shapes_out = output_shapes(self.network, patch)
        check_outputs(config, shapes_out, num_organs)
        self.deep_supervision = config.deep_supervision is not False
        self._features: dict[str, Tensor] = {}
        self.adapters = nn.ModuleList()
        layers = sorted(set(taps.values() if isinstance(taps, Mapping) else taps))
        shapes = tap_shapes(self.network, layers, patch)
        self.layer_of: dict[TapKey, str] = {}
        if taps and cached:
            strides = {layer: stride for layer, (_, stride) in shapes.items()}
            self.layer_of = pair_taps(taps, strides, cached)
        self.cached = {key: (cached or {})[key] for key in self.layer_of}
        for key, layer in self.layer_of.items():
            channels, _ = shapes[layer]
            wanted = self.cached[key].channels
            # Without a bias: standardised targets have mean 0, and a constant answer explains none.
            self.adapters.append(nn.Conv3d(channels, wanted, kernel_size=1, bias=False))
        for layer in sorted(set(self.layer_of.values())):
            find_module(self.network, layer).register_forward_hook(self._keep(layer))

    def from_the_loss(self) -> list[nn.Parameter]:
        """Weights about as a backward pass reaches them; adapters last, which not every step
        uses."""
        return [*reversed(list(self.network.parameters())), *self.adapters.parameters()]

    def forward(self, image: Tensor) -> tuple[Outputs, dict[str, Tensor]]:
        """(N, 1, D, H, W) -> logits (N, K + 1, D, H, W), and layer -> tapped feature.

        Under deep supervision, while training, a tuple of logits, the full-size ones first.
        """
        outputs: Outputs = self.network(image)
        features, self._features = self._features, {}
        if isinstance(outputs, tuple) and not self.deep_supervision:
            outputs = outputs[0]
        return outputs, features

    def adapt(self, key: TapKey, features: Mapping[str, Tensor]) -> Tensor:
        """The student's feature for a cached tap, projected to that tap's channels."""
        adapter = self.adapters[list(self.cached).index(key)]
        adapted: Tensor = adapter(features[self.layer_of[key]])
        return adapted

    def _keep(self, layer: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            self._features[layer] = output

        return hook


def pair_taps(
    taps: StudentTaps, strides: Mapping[str, Index3], cached: Mapping[TapKey, CachedTap]
) -> dict[TapKey, str]:
    """Which layer of the student each cached tap is compared with.

    Args:
        taps: layers, each for all cached taps of its stride; or cached tap -> layer, in which case
            taps that are not named are left out.

    Raises:
        ConfigError: a layer of another stride than its cached tap, a cached tap without a layer or
            with several, a layer without a cached tap, or no such cached tap.
    """
    if isinstance(taps, Mapping):
        unknown = sorted(set(taps) - {name for _, name in cached})
        if unknown:
            raise ConfigError(
                f"the cache has no tap {', '.join(map(repr, unknown))}.",
                where=_WHERE,
                fix=f"It has: {', '.join(sorted({name for _, name in cached}))}.",
            )
        pairs = {key: taps[key[1]] for key in cached if key[1] in taps}
        for key, layer in pairs.items():
            if cached[key].stride != strides[layer]:
                raise _no_such_cells([layer], strides, key, cached[key])
        return pairs
    pairs = {}
    for key, entry in cached.items():
        fitting = [layer for layer in taps if strides[layer] == entry.stride]
        if not fitting:
            raise _no_such_cells(taps, strides, key, entry)
        if len(fitting) > 1:
            raise ConfigError(
                f"layers {' and '.join(map(repr, fitting))} of the student have the same stride; "
                f"tap {key[1]!r} of teacher {key[0]} could be compared with either.",
                where=_WHERE,
                fix="Leave one out, or write {cached tap: layer}.",
            )
        pairs[key] = fitting[0]
    idle = [layer for layer in taps if layer not in pairs.values()]
    if idle:
        raise ConfigError(
            f"no cached tap has the cells of layer {', '.join(map(repr, idle))} of the student.",
            where=_WHERE,
            fix="Leave it out, or cache a tap of that stride.",
        )
    return pairs


def _no_such_cells(
    layers: Sequence[str], strides: Mapping[str, Index3], key: TapKey, entry: CachedTap
) -> ConfigError:
    said = ", ".join(
        f"layer {name!r} of the student has cells of {strides[name]}" for name in layers
    )
    return ConfigError(
        f"{said} voxels, tap {key[1]!r} of teacher {key[0]} is cached in cells of {entry.stride}.",
        where=_WHERE,
        fix="Choose a layer of the student with the same stride, leave the tap out by naming pairs "
        "of {cached tap: layer}, or re-cache that teacher with another tap.",
    )


def _with_background(organs: Tensor) -> Tensor:
    """(..., K, D, H, W) -> (..., K + 1, D, H, W)."""
    return torch.cat([torch.zeros_like(organs.narrow(-4, 0, 1)), organs], dim=-4)


def seeded_network(
    config: TrainingConfig, num_organs: int, cached: Mapping[TapKey, CachedTap] | None = None
) -> StudentNetwork:
    """A student whose first weights depend on the seed alone, whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return StudentNetwork(config, num_organs, cached)


# Deep supervision: every output of a network is taught, coarser ones with less weight.
#
# A coarser output is brought to full size by repeating its values (nearest), as MONAI's DynUNet
# does of itself, and meets the very targets of the full-size output. So nothing that is cached is
# averaged or thinned out: a voxel that is ignored, not seen or in no region stays so, and a small
# organ cannot fall through a coarse grid. What a coarse cell learns is the mean of the targets of
# its voxels.

Outputs = Tensor | tuple[Tensor, ...]


def output_weights(num: int) -> list[float]:
    """Weights of outputs, the full-size one first: 2^-i, divided by their sum.

    Source: nnU-Net (Isensee et al. 2021), which gives 0 to the coarsest of its outputs; here a
    network has as many outputs as it was asked for, and each counts.
    """
    halved = [2.0**-i for i in range(num)]
    return [weight / sum(halved) for weight in halved]


def over_outputs(
    outputs: Outputs, terms_of: Callable[[Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Each term of the loss, summed over the outputs with `output_weights`.

    Args:
        outputs: logits (N, C, D, H, W), or several, the full-size ones first.
        terms_of: full-size logits -> terms.
    """
    if isinstance(outputs, Tensor):
        return terms_of(outputs)
    size = outputs[0].shape[2:]
    total: dict[str, Tensor] = {}
    for weight, logits in zip(output_weights(len(outputs)), outputs, strict=True):
        full = logits if logits.shape[2:] == size else F.interpolate(logits, size=size)
        for name, term in terms_of(full).items():
            total[name] = total[name] + weight * term if name in total else weight * term
    return total


def check_outputs(
    config: TrainingConfig, shapes: Sequence[tuple[int, ...]], num_organs: int
) -> None:
    """Whether a network can be a student. `shapes`: (C, D, H, W) of its outputs while training.

    Raises:
        ConfigError: other outputs than logits of the patch, or only one where several are needed.
    """
    name, wanted = config.network.name, (num_organs + 1, *config.patch)
    if shapes[0] != wanted or any(s[:1] != wanted[:1] for s in shapes):
        raise ConfigError(
            f"{name} gives outputs of shape {', '.join(map(str, shapes))} while training, "
            f"where logits of {wanted} (channels, z, y, x) are needed.",
            where="network",
            fix="Choose a segmentation network whose output has the size of its input.",
        )
    if config.deep_supervision and len(shapes) == 1:
        raise ConfigError(
            f"{name} with these arguments has one output: there is nothing to supervise deeply.",
            where="training.deep_supervision",
            fix="Give network.args what makes it several (DynUNet, MedNeXt, BasicUNetPlusPlus, "
            "nnU-Net's: deep_supervision: true; SegResNetDS: dsdepth: 3), or leave it out.",
        )
