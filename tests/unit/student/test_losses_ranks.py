"""Two processes that share a batch learn what one process learns from all of it.

Both processes are real and sum by gloo, so that a sum that one makes and the other does not, in
the forward or in the backward pass, shows as an error or a hang here.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.data.labels import IGNORE
from pipeline.student.network import TapKey
from pipeline.student.settings import SupervisionConfig
from pipeline.student.supervision import Batch, batch_loss
from tests.unit.student.fixed import NAN, SHAPE, Fixed, K

ROOT = Path(__file__).resolve().parents[3]
N, RANKS = 4, 2
FEATURES = {"student_taps": ["x"], "weight": 0.5, "ramp": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    **{
        kind: {"kind": kind}
        for kind in ("naive", "marginal", "marginal_exclusion", "pseudo_label", "masked_bce")
    },
    **{
        f"ms_kd {schedule}": {
            "kind": "ms_kd",
            "logits": {"schedule": schedule, "temperature": 2.0},
            "features": FEATURES,
        }
        for schedule in ("constant", "decay")
    },
}
# What the second process may be given: as much as the first; no organ that the first has; nothing.
SHARES = ("alike", "other organs", "nothing")


class Adapted(Fixed):
    """With an adapter, whose weights all processes share."""

    def __init__(self, logits: Tensor, feature: Tensor) -> None:
        super().__init__(logits, feature)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.adapter = nn.Conv3d(2, 2, 1).double()

    def adapt(self, key: TapKey, features: Mapping[str, Tensor]) -> Tensor:
        adapted: Tensor = self.adapter(features["x"])
        return adapted


def whole_batch(share: str) -> tuple[Tensor, Tensor, Batch]:
    """Logits, student's feature, and batch of N samples, of which the last are the second's."""
    generator = torch.Generator().manual_seed(SHARES.index(share))

    def normal(*shape: int) -> Tensor:
        return 2 * torch.randn((N, *shape), generator=generator, dtype=torch.float64)

    log_odds, classes = normal(K, *SHAPE), torch.randint(0, 2, (N, *SHAPE), generator=generator)
    classes[:, 0, 0] = IGNORE
    annotated = torch.tensor([[True, False], [True, True], [True, False], [True, False]])
    known = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    features = {("one", "a"): normal(2, 1, 1, 1), ("both", "b"): normal(2, 1, 1, 1)}
    second = slice(N // RANKS, None)
    if share == "other organs":
        annotated[second] = known[second] = torch.tensor([False, True])
        classes[second] *= 2 * (classes[second] != IGNORE) + (classes[second] == IGNORE)
    elif share == "nothing":
        annotated[second] = known[second] = False
        classes[second] = IGNORE
        for feature in features.values():
            feature[second] = NAN
    log_odds[~known] = NAN
    batch = Batch(
        image=torch.zeros(N, 1, *SHAPE),
        classes=classes,
        annotated=annotated,
        known=known,
        log_odds=log_odds,
        body=torch.ones((N, *SHAPE), dtype=torch.bool),
        features=features,
    )
    return normal(K + 1, *SHAPE), normal(2, 1, 1, 1), batch


def part(batch: Batch, samples: slice) -> Batch:
    """Some samples of a batch."""

    def of(value: Any) -> Any:
        return (
            {k: v[samples] for k, v in value.items()} if isinstance(value, dict) else value[samples]
        )

    return Batch(**{f.name: of(getattr(batch, f.name)) for f in dataclasses.fields(batch)})


def learn(samples: slice) -> dict[str, dict[str, Tensor]]:
    """Loss and gradients of every setting on some samples of every batch."""
    results = {}
    for share in SHARES:
        logits, feature, batch = whole_batch(share)
        for name, values in SETTINGS.items():
            network = Adapted(logits[samples].clone(), feature[samples])
            settings = SupervisionConfig.model_validate(values)
            loss, _ = batch_loss(settings, network, part(batch, samples), 0.25)
            loss.backward()  # type: ignore[no-untyped-call]
            assert network.logits.grad is not None
            found = {"loss": loss.detach(), "logits": network.logits.grad}
            if settings.uses_features:
                assert network.adapter.weight.grad is not None
                found["adapter"] = network.adapter.weight.grad
            results[f"{name}, {share}"] = found
    return results


def main(rank: int, folder: Path) -> None:
    """One of the processes."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    size = N // RANKS
    torch.save(learn(slice(rank * size, (rank + 1) * size)), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(rank), str(folder)],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    complaints = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(complaints)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """What one process learns from all samples."""
    return learn(slice(None))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradients_are_those_of_the_whole_batch(
    learnt: list[dict[str, dict[str, Tensor]]],
    alone: dict[str, dict[str, Tensor]],
    name: str,
    share: str,
) -> None:
    whole, parts = alone[f"{name}, {share}"], [r[f"{name}, {share}"] for r in learnt]
    for found in parts:
        assert float(found["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-12)
    # DDP takes the mean of the gradients of all processes, and only one process has a sample.
    together = torch.cat([found["logits"] for found in parts]) / RANKS
    assert whole["logits"].any()
    assert torch.allclose(together, whole["logits"], rtol=1e-9, atol=1e-14)
    if "adapter" in whole:
        mean = torch.stack([found["adapter"] for found in parts]).mean(dim=0)
        assert torch.allclose(mean, whole["adapter"], rtol=1e-9, atol=1e-14)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
