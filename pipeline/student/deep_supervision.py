"""Deep supervision: every output of a network is taught, coarser ones with less weight.

A coarser output is brought to full size by repeating its values (nearest), as MONAI's DynUNet does
of itself, and meets the very targets of the full-size output. So nothing that is cached is averaged
or thinned out: a voxel that is ignored, not seen or in no region stays so, and a small organ cannot
fall through a coarse grid. What a coarse cell learns is the mean of the targets of its voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import ConfigError
from pipeline.network import NetworkConfig

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
    config: NetworkConfig,
    shapes: Sequence[tuple[int, ...]],
    wanted: tuple[int, ...],
    deep_supervision: bool | None,
) -> None:
    """Whether a network can be a student.

    Args:
        config: of the network.
        shapes: (C, D, H, W) of its outputs while training.
        wanted: that of the full-size output.
        deep_supervision: True: there must be several outputs.

    Raises:
        ConfigError: other outputs than logits of the patch, or only one where several are needed.
    """
    if shapes[0] != wanted or any(s[:1] != wanted[:1] for s in shapes):
        raise ConfigError(
            f"{config.name} gives outputs of shape {', '.join(map(str, shapes))} while training, "
            f"where logits of {wanted} (channels, z, y, x) are needed.",
            where="network",
            fix="Choose a segmentation network whose output has the size of its input.",
        )
    if deep_supervision and len(shapes) == 1:
        raise ConfigError(
            f"{config.name} with these arguments has one output: there is nothing to supervise "
            "deeply.",
            where="training.deep_supervision",
            fix="Give network.args what makes it several (DynUNet, MedNeXt, BasicUNetPlusPlus: "
            "deep_supervision: true; SegResNetDS: dsdepth: 3), or take this setting out.",
        )
