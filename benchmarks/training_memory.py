"""What a training step must hold, counted without a GPU: weights, activations, loss, batch.

Activations are what autograd saves for the backward pass, counted by `saved_tensors_hooks` on a
pass of shapes (torch's meta device); for bf16 the network is cast as a whole. Both were held
against real passes on the CPU, under autocast for bf16: equal within 0.1 %. What the loss saves is
counted in a real pass at 32^3 and scaled by voxels.

    python -m benchmarks.training_memory [CONFIG.yaml ..] [--organs 15]

Not counted, and to be left room for: gradients of activations while they pass through, cuDNN's
workspaces, the allocator's gaps, the CUDA context; and what --compile would save.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stages
from pipeline.config import load_config
from pipeline.log import print_table
from pipeline.networks.by_name import build_network
from pipeline.student.network import Outputs
from pipeline.student.settings import TrainingConfig, build_optimiser
from pipeline.student.supervision import Batch, batch_loss
from stages.train_student import TrainStudentConfig

EDGE = 32


def main() -> None:
    """Prints gibibytes per settings file, in fp32 and bf16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", type=Path, nargs="*")
    parser.add_argument("--organs", type=int, default=15)
    arguments = parser.parse_args()
    paths = arguments.configs or sorted(Path(stages.__file__).parent.glob("train_student*.yaml"))
    rows = []
    for path in paths:
        training = load_config(path, TrainStudentConfig).training
        for dtype in (torch.float32, torch.bfloat16):
            found = counted(training, arguments.organs, dtype)
            total = sum(found.values())
            kind = str(dtype).removeprefix("torch.")
            row = [path.name, kind, *(f"{n / 2**30:.2f}" for n in found.values())]
            rows.append([*row, f"{total / 2**30:.1f}"])
    columns = ["settings", "precision", *found, "sum"]
    print_table(f"GiB of one training step, {arguments.organs} organs", columns, rows)


def counted(training: TrainingConfig, num_organs: int, dtype: torch.dtype) -> dict[str, float]:
    """Bytes per part."""
    network = build_network(training.network, in_channels=1, out_channels=num_organs + 1)
    weights = sum(w.numel() for w in network.parameters())
    states = {"adamw": 2, "sgd": 1}[training.optimiser.name]
    assert build_optimiser(training.optimiser, network)
    network = network.train().to("meta", dtype=dtype)
    image = torch.zeros(training.batch_size, 1, *training.patch, device="meta", dtype=dtype)
    with _saved(network) as saved:
        outputs: Outputs = network(image)
    heads = len(outputs) if isinstance(outputs, tuple) else 1
    voxels = image.numel()
    batch = _batch(num_organs)
    held = [batch.image, batch.classes, batch.log_odds]
    per_voxel = sum(t.element_size() * t.numel() for t in held if t is not None) / EDGE**3
    copies = weights * 2 if dtype == torch.bfloat16 else 0
    return {
        "weights, gradients, optimiser": 4.0 * weights * (2 + states) + copies,
        "activations": float(sum(saved.values())),
        "loss": voxels * heads * _loss_bytes(training, batch, num_organs) / EDGE**3,
        "batch": voxels * per_voxel,
    }


def _loss_bytes(training: TrainingConfig, batch: Batch, num_organs: int) -> int:
    logits = torch.randn(1, num_organs + 1, EDGE, EDGE, EDGE, requires_grad=True)

    class Fixed(nn.Module):
        def forward(self, image: Tensor) -> tuple[Tensor, None]:
            return logits, None

    network: Any = Fixed()
    with _saved(network) as saved:
        batch_loss(training.supervision, network, batch, 0.0)
    # Logits are among the network's activations; their float32 copy under autocast is not.
    return sum(saved.values())


def _batch(num_organs: int) -> Batch:
    d = 5 * torch.randn(1, num_organs, EDGE, EDGE, EDGE) - 5
    annotated = torch.zeros(1, num_organs, dtype=torch.bool)
    annotated[:, 0] = True
    return Batch(
        image=torch.randn(1, 1, EDGE, EDGE, EDGE),
        classes=(d[:, 0] > 0).long(),
        annotated=annotated,
        known=torch.ones_like(annotated),
        log_odds=d,
    )


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


if __name__ == "__main__":
    main()
