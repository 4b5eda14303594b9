"""What a network's forward gives: logits are wanted, and probabilities are not taken for them.

Log-odds of softmax outputs would lie in [-1, 1] and say nothing of how sure a network is. So the
outputs of each case are looked at, and a registry entry may say `outputs: probabilities`: then they
are turned into logits window by window, and all that follows is as for any other teacher.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.data.entries import TeacherEntry
from pipeline.errors import OutputsError, TeacherWarning

if TYPE_CHECKING:
    from torch import Tensor, nn

FloatArray = npt.NDArray[np.float32]

# Sums of channels in half precision, rounded in the network and where windows are blended.
_TOLERANCE = 0.01
# A probability this near to 0 or 1 is what a network gives for most voxels of most cases.
_NEAR = 0.05
# The least that is told from 0, and from 1 in float32: log-odds of +-16.6. In half precision 0 ends
# there too, and 1 much earlier, see `to_logits`.
_LEAST = 2.0**-24
_ONE_STEP_LESS = (
    "They hold no log-odds. Use the network without its last step (argmax or a threshold)."
)


class OutputsOfCase:
    """Looks at all outputs of one case, slab by slab, for what cannot be logits.

    Blending keeps what shows it: weighted means of values in [0, 1] are in [0, 1], and of channels
    that sum to 1 the means do. One value below 0 settles that these are logits, and nearly always
    the first slab has one; from then on nothing is computed. What is left is decided at the end of
    the case, since a few windows of air may happen to lie in [0, 1].
    """

    def __init__(self, entry: TeacherEntry, *, where: str) -> None:
        self._entry, self._where = entry, where
        self._are_logits = False
        self._low = self._high = np.empty(0)  # per channel
        self._off = 0.0  # sum of channels from 1, at most
        self._num = self._num_near = self._num_whole = 0

    def put(self, outputs: FloatArray) -> None:
        """The next rows (C, n, H, W), finite."""
        if self._are_logits:
            return
        low, high = outputs.min(axis=(1, 2, 3)), outputs.max(axis=(1, 2, 3))
        one_channel = len(outputs) == 1
        if low.min() < 0 or (high.max() > 1 + _TOLERANCE and not one_channel):
            self._are_logits = True
            return
        self._low = np.minimum(self._low, low) if self._num else low
        self._high = np.maximum(self._high, high) if self._num else high
        self._off = max(self._off, float(np.abs(outputs.sum(axis=0) - 1).max()))
        self._num += outputs.size
        self._num_near += int(np.count_nonzero((outputs < _NEAR) | (np.abs(outputs - 1) < _NEAR)))
        self._num_whole += int(np.count_nonzero(outputs == np.rint(outputs))) if one_channel else 0

    def judge(self) -> None:
        """To be called when all of the case has been put.

        Raises:
            OutputsError: they are probabilities, or a map of labels.
        """
        if self._are_logits or not self._num:
            return
        varies = bool((self._high > self._low).any())
        near, whole = self._num_near / self._num, self._num_whole / self._num
        sums_to_one = len(self._low) > 1 and self._off <= _TOLERANCE
        if varies and whole > 0.9:  # where windows disagree, their mean is no whole number
            raise OutputsError(
                "the network gives whole numbers in one channel: a map of labels, not logits.",
                where=self._where,
                fix=_ONE_STEP_LESS,
            )
        if self._high.max() > 1 + _TOLERANCE:
            return
        # The same everywhere may be a dead network, unless it is as sure as only probabilities are.
        if sums_to_one and (varies or near == 1):
            raise self._refused("and its channels sum to 1 in every voxel")
        # Logits that come near both ends would pass them somewhere in a case.
        if varies and (near > 0.5 or (self._high - self._low).max() > 1 - 2 * _NEAR):
            raise self._refused("and fill it as only probabilities do")
        if varies:
            warnings.warn(
                f"{self._where}: all outputs lie in [0, 1]. If they are probabilities, enter "
                "`outputs: probabilities` in the registry; if they are logits, the network is sure "
                "of nothing.",
                TeacherWarning,
                stacklevel=2,
            )

    def _refused(self, what: str) -> OutputsError:
        return OutputsError(
            f"the network's outputs are probabilities, not logits: all lie in [0, 1], {what}.",
            where=self._where,
            fix="nnU-Net's own networks do not end so: use a teacher of kind `factory`, with "
            "`outputs: probabilities`."
            if self._entry.kind == "nnunet"
            else f"End the network before its {self._entry.activation}, or enter `outputs: "
            "probabilities` for this teacher in the registry.",
        )


def first_output(out: Any) -> Any:
    """Of what a network's forward gives: the first of several outputs is the full-size one."""
    return out[0] if isinstance(out, (list, tuple)) else out


def giving_logits(network: nn.Module, entry: TeacherEntry, *, where: str) -> nn.Module:
    """The network; if its outputs are probabilities, with a forward hook that makes logits of them,
    so that names of its layers stay. `where` names the teacher in errors."""
    if entry.outputs != "probabilities":
        return network
    import torch

    if isinstance(network, torch.jit.ScriptModule):  # takes no hooks
        network = torch.nn.Sequential(network)

    def hook(module: nn.Module, inputs: Any, out: Any) -> Any:
        out = first_output(out)
        return to_logits(out, entry, where=where) if isinstance(out, torch.Tensor) else out

    network.register_forward_hook(hook)
    return network


def to_logits(outputs: Tensor, entry: TeacherEntry, *, where: str) -> Tensor:
    """Probabilities -> logits: log p for softmax, log(p / (1 - p)) for sigmoid.

    They are bounded by what the outputs can tell from 0 and 1. p = 0 counts as 2^-24, so log-odds
    of a softmax lie between -16.6 and 16.6, whatever the precision. A sigmoid's p = 1 counts as the
    number before 1: 16.6 for float32 outputs, 7.6 for float16, 5.5 for bfloat16.

    Args:
        outputs: (N, C, ..) probabilities; NaN stays NaN.

    Returns:
        float32 (N, C, ..).

    Raises:
        OutputsError: they are no probabilities, or one-hot.
    """
    import torch

    p = outputs.float()
    low, high = float(p.min()), float(p.max())
    if low < 0 or high > 1 + _TOLERANCE:
        raise OutputsError(
            f"`outputs: probabilities` is said of it, but its outputs reach from {low:.3g} to "
            f"{high:.3g}.",
            where=where,
            fix="Leave `outputs` out: these are logits.",
        )
    off = float((p.sum(dim=1) - 1).abs().max()) if entry.activation == "softmax" else 0.0
    if off > _TOLERANCE:
        raise OutputsError(
            f"`outputs: probabilities` is said of it, but the channels sum to 1 only within "
            f"{off:.2g}.",
            where=where,
            fix="Set `activation: sigmoid` if each channel is a probability by itself.",
        )
    spatial = tuple(range(2, p.ndim))
    varies = (p.amax(dim=spatial) > p.amin(dim=spatial)).any()
    # Any network is in doubt somewhere between two classes; alone inside one, it may round to 1.
    if bool(varies & ((p == 0) | (p == 1)).all()):
        raise OutputsError(
            "its outputs are one-hot: 0 and 1, and nothing between.",
            where=where,
            fix=_ONE_STEP_LESS,
        )
    if entry.activation == "softmax":
        return p.clamp(min=_LEAST).log()
    before_one = 1 - max(_LEAST, torch.finfo(outputs.dtype).eps / 2)
    p = p.clamp(min=_LEAST, max=before_one)
    return p.log() - torch.log1p(-p)
