"""bf16 gradients of 3 x 3 x 3 convolutions on this device against those in float32.

    python -m benchmarks.half_precision [--device cuda]

Why `--precision` is refused on a CPU: with torch 2.13 on a CPU with AVX512-BF16 the gradient of the
weights is garbage (up to inf) where the map has 2 x 2 x 2 voxels, as the deepest layer of a network
for small patches has. Freed memory that holds NaN makes it show at once: the result depends on it.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F


def main() -> None:
    """Prints the largest error of six tries per size and number of channels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args().device)
    torch.manual_seed(0)
    print("voxels  channels  largest gradient  largest error of bf16")
    for size in (2, 4, 8):
        for channels in (64, 96, 320):
            image = torch.randn(1, channels, size, size, size, device=device)
            weight = 0.05 * torch.randn(channels, channels, 3, 3, 3, device=device)
            back = torch.randn_like(image)
            exact = _gradient(image, weight, back)
            errors = []
            for _ in range(6):
                _dirty_memory(device)
                half = _gradient(image.bfloat16(), weight.bfloat16(), back.bfloat16())
                error = (half.float() - exact).abs().nan_to_num(nan=torch.inf)
                errors.append(float(error.max()))
            print(
                f"{size:>4}^3  {channels:>8}  {float(exact.abs().max()):>16.2f}  {max(errors):.3g}"
            )


def _gradient(image: torch.Tensor, weight: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    weight = weight.detach().requires_grad_()
    F.conv3d(image, weight, padding=1).backward(back)  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    return weight.grad


def _dirty_memory(device: torch.device) -> None:
    sizes = [2**power for power in (12, 16, 18, 19, 20, 22)] * 4
    held = [torch.full((size,), torch.nan, device=device) for size in sizes]
    del held


if __name__ == "__main__":
    main()
