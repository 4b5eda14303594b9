"""What a training step must hold, counted without a GPU: weights, activations, loss, batch.

Activations are what autograd saves for the backward pass, counted by `saved_tensors_hooks` on a
pass of shapes (torch's meta device); for bf16 the network is cast as a whole. What the loss saves
is counted in a real pass at 32^3 and scaled by voxels. Held against real passes on the CPU
(`benchmarks/README.md`, training_memory): equal within 0.1 %.

Not counted, and to be left room for: gradients of activations while they pass through, cuDNN's
workspaces, the allocator's gaps, the CUDA context; and what --compile would save.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.networks.by_name import build_network
from pipeline.student.network import Outputs
from pipeline.student.settings import TrainingConfig
from pipeline.student.supervision import Batch, batch_loss

_EDGE = 32


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step.

    Attributes:
        weights: with their gradients and the optimiser's states; and half-precision copies.
        batch: image, classes, log-odds.
    """

    weights: float
    activations: float
    loss: float
    batch: float

    @property
    def total(self) -> float:
        """All parts together."""
        return self.weights + self.activations + self.loss + self.batch


def step_memory(training: TrainingConfig, num_organs: int, dtype: torch.dtype) -> StepMemory:
    """Counts a training's step, in float32 or bfloat16.

    Raises:
        ConfigError: no such network, or arguments or a patch that it does not take.
    """
    with torch.device("meta"):  # weights without values
        network = build_network(training.network, in_channels=1, out_channels=num_organs + 1)
        network = network.train().to(dtype=dtype)
        image = torch.zeros(training.batch_size, 1, *training.patch, dtype=dtype)
    weights = sum(w.numel() for w in network.parameters())
    with _saved(network) as saved:
        outputs: Outputs = network(image)
    several = isinstance(outputs, tuple) and training.deep_supervision is not False
    per_output, per_voxel = _loss_bytes(training, num_organs)
    states = {"adamw": 2, "sgd": 1}[training.optimiser.name]
    return StepMemory(
        weights=4.0 * weights * (2 + states) + weights * 2 * (dtype == torch.bfloat16),
        activations=float(sum(saved.values())),
        loss=image.numel() * per_output * (len(outputs) if several else 1),
        batch=image.numel() * per_voxel,
    )


def _loss_bytes(training: TrainingConfig, num_organs: int) -> tuple[float, float]:
    """Bytes per voxel that the loss of one output saves, and that a batch takes."""
    # The generator is a fresh one: counting leaves no trace in what is trained afterwards.
    random = torch.Generator().manual_seed(0)
    d = 5 * torch.randn(1, num_organs, _EDGE, _EDGE, _EDGE, generator=random) - 5
    annotated = torch.zeros(1, num_organs, dtype=torch.bool)
    annotated[:, 0] = True
    image, classes = torch.zeros(1, 1, _EDGE, _EDGE, _EDGE), (d[:, 0] > 0).long()
    batch = Batch(image, classes, annotated, torch.ones_like(annotated), d)
    logits = torch.zeros(1, num_organs + 1, _EDGE, _EDGE, _EDGE, requires_grad=True)

    class Fixed(nn.Module):
        def forward(self, image: Tensor) -> tuple[Tensor, None]:
            return logits, None

    network: Any = Fixed()
    with _saved(network) as saved:
        batch_loss(training.supervision, network, batch, 0.0)
    # Logits are among the network's activations; their float32 copy under autocast is not.
    held = sum(t.element_size() * t.numel() for t in (image, classes, d))
    return sum(saved.values()) / math.prod(image.shape), held / math.prod(image.shape)


@contextmanager
def _saved(network: nn.Module) -> Iterator[dict[int, int]]:
    """Storage -> bytes of what autograd saves, weights left out."""
    found: dict[int, int] = {}
    own = {w.untyped_storage()._cdata for w in network.parameters()}
    alive = []  # or a storage's address might be used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            alive.append(tensor)
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
