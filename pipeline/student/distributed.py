"""Several processes that train one student: how torchrun or srun started them, who they are, and
how they keep together.

Each loads its share of every batch, and gradients are averaged while the backward pass runs. What
one process finds out (an error, a signal, a checkpoint) all learn by asking each other at fixed
places, so that none waits for one that has left.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.config import digest
from pipeline.errors import ConfigError, PipelineError
from pipeline.log import Log

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank: 0 .. size - 1; the first alone writes.
        local_rank: number on its machine, which says which GPU is its own.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """Samples of a batch that each process makes.

        Raises:
            ConfigError: they cannot all make equally many.
        """
        if batch_size % self.size:
            raise ConfigError(
                f"a batch of {batch_size} cannot be shared equally by {self.size} processes.",
                where="training.batch_size",
                fix="It counts the samples of all processes: choose a multiple of their number.",
            )
        return batch_size // self.size

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set in any process."""
        if self.size == 1:
            return flags
        told = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return tuple(bool(flag) for flag in told)

    def gathered(self, compute: Callable[[], T]) -> list[T]:
        """What every process computes, by rank.

        Raises:
            PipelineError: in all processes, if it was raised in one; that of the lowest rank.
        """
        if self.size == 1:
            return [compute()]
        value: T | None = None
        error: Exception | None = None
        try:
            value = compute()
        except Exception as found:
            error = found
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, (value, _portable(error)))
        if error is not None:
            raise error
        self._raise_first([found for _, found in answers])
        return [result for result, _ in answers]

    def together(self, compute: Callable[[], T]) -> T:
        """What this process computes, if all can; errors as in `gathered`."""
        kept: list[T] = []
        self.gathered(lambda: kept.append(compute()))
        return kept[0]

    def from_first(self, compute: Callable[[], T]) -> T:
        """What the first process computes, in all of them; so is its error."""
        if self.size == 1:
            return compute()
        own: Exception | None = None
        answer: list[Any] = [None]
        if self.is_first:
            try:
                answer = [(compute(), None)]
            except Exception as error:
                own = error
                answer = [(None, _portable(error))]
        dist.broadcast_object_list(answer, src=0)
        if own is not None:
            raise own
        result: T
        result, told = answer[0]
        self._raise_first([told])
        return result

    def same(self, value: T, what: str) -> T:
        """The value, which all processes must have alike.

        Raises:
            ConfigError: another process has another one.
        """
        others = self.gathered(lambda: digest(value))
        if len(set(others)) > 1:
            odd = next(rank for rank, other in enumerate(others) if other != others[0])
            raise ConfigError(
                f"{what} that it reads is not that of process 0.",
                where=f"process {odd} of {self.size}",
                fix="Let all machines read one folder, or copies of the same state of it.",
            )
        return value

    def raise_any(self, error: PipelineError | None) -> None:
        """Raises an error of any process in all of them; one number is exchanged if there is none.

        Raises:
            PipelineError: as in `gathered`.
        """

        def own() -> None:
            if error is not None:
                raise error

        if any(self.any(error is not None)):
            self.together(own)

    @contextmanager
    def averaging(self, weights: Sequence[nn.Parameter]) -> Iterator[None]:
        """For one backward pass: gradient := mean over all processes; with `ranks.over_ranks`, that
        of the whole batch. Gradients travel in buckets, each as soon as it is full.

        A weight without a gradient counts as 0, unless it has none anywhere: then it keeps none, as
        in one process (an optimiser moves a weight whose gradient is 0). Each bucket is one sum of
        the same weights in the same order, so the result is the same bits whenever the number of
        processes is.

        Args:
            weights: about in the order in which the pass reaches them, alike in all processes.
        """
        if self.size == 1:
            yield
            return
        buckets = _Buckets([weight for weight in weights if weight.requires_grad], self.size)
        hooks = [
            w.register_post_accumulate_grad_hook(buckets.ready)  # type: ignore[no-untyped-call]
            for w in buckets.bucket_of
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        buckets.finish()

    def log(self, log: Log) -> Log:
        """The first process speaks; the others keep silent."""
        return log if self.is_first else Silent()

    @contextmanager
    def folder_to_write(self, folder: Path) -> Iterator[Path]:
        """The folder itself in the first process; in the others one that nobody sees."""
        if self.is_first:
            yield folder
            return
        with TemporaryDirectory(prefix="organ-distill-") as unseen:
            yield Path(unseen)

    def device(self, found: torch.device) -> torch.device:
        """The GPU of this process, where one was asked for without a number.

        A scheduler may show each process its own GPU alone, or all of a machine to each.
        """
        if self.size == 1 or str(found) != "cuda":
            return found
        own = torch.device("cuda", self.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(own)
        return own

    def check_network(self, network: nn.Module) -> None:
        """Refuses what several processes cannot train as one does.

        Raises:
            ConfigError: batch norm, whose statistics would be those of a share of the batch.
        """
        if self.size > 1 and any(isinstance(m, _BatchNorm) for m in network.modules()):
            raise ConfigError(
                "batch norm sees only the share of a batch that its own process holds, so "
                f"{self.size} processes would not train what one trains.",
                where="training.network",
                fix="Choose norm: instance (or group), or train in one process.",
            )

    def _raise_first(self, errors: list[PipelineError | None]) -> None:
        for rank, error in enumerate(errors):
            if error is not None:
                error.what = f"process {rank} of {self.size} failed: {error.what}"
                raise error


ALONE = Processes()

# Small enough that the first travel early, large enough that a network has few.
_BUCKET_BYTES = 8 << 20


class _Buckets:
    """Gradients of one backward pass on their way through all processes.

    Every process sends its buckets in the same order, the only one that all of them know: a bucket
    that is full waits for those before it. Sums within the losses come before the first bucket,
    since a weight's gradient needs that of all losses.
    """

    def __init__(self, weights: Sequence[nn.Parameter], size: int) -> None:
        self._size = size
        self._buckets: list[list[nn.Parameter]] = []
        self.bucket_of: dict[nn.Parameter, int] = {}
        filled = _BUCKET_BYTES
        for weight in weights:
            if filled >= _BUCKET_BYTES:
                self._buckets.append([])
                filled = 0
            self._buckets[-1].append(weight)
            self.bucket_of[weight] = len(self._buckets) - 1
            filled += weight.numel() * weight.element_size()
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent: list[tuple[Tensor, Any]] = []

    def ready(self, weight: Tensor) -> None:
        """Its gradient is complete."""
        assert isinstance(weight, nn.Parameter)
        self._missing[self.bucket_of[weight]] -= 1
        while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
            self._send()

    def finish(self) -> None:
        """Sends what no gradient came for, and waits for all."""
        while len(self._sent) < len(self._buckets):
            self._send()
        for bucket, (flat, work) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            used, *sums = torch.split(flat, [len(bucket), *(w.numel() for w in bucket)])
            for weight, total, use in zip(bucket, sums, used.tolist(), strict=True):
                if use:
                    grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                    weight.grad = grad.copy_(total.view_as(weight) / self._size)

    @torch.no_grad()
    def _send(self) -> None:
        """The next bucket: which of its weights have a gradient, and their gradients."""
        bucket = self._buckets[len(self._sent)]
        present = torch.tensor([w.grad is not None for w in bucket], device=bucket[0].device)
        parts = [torch.zeros_like(w) if w.grad is None else w.grad for w in bucket]
        flat = torch.cat([present.float(), *(part.float().flatten() for part in parts)])
        self._sent.append((flat, dist.all_reduce(flat, async_op=True)))


class Silent(Log):
    """Says and writes nothing."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def warn(self, text: str) -> None:
        """Dropped: the first process says it."""


def _portable(error: Exception | None) -> PipelineError | None:
    """What another process can be told of an error."""
    if error is None or isinstance(error, PipelineError):
        return error
    return PipelineError(
        f"it failed ({type(error).__name__}: {error}).",
        where="another process",
        fix="Its own output says where.",
    )


# How the processes of a training find each other, started by torchrun or srun.

# Validation of one large case on the CPU must fit in: the others wait for it.
PATIENCE = timedelta(minutes=30)


def launched(environment: Mapping[str, str] = os.environ) -> Processes:
    """Who this process is, as torchrun or srun tells; alone if neither started it.

    Raises:
        ConfigError: a rank that cannot be.
    """
    if "WORLD_SIZE" in environment and "RANK" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        # Set by srun alone; a batch script of many tasks that calls no srun is one process.
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return ALONE
    try:
        rank, size, local = (int(environment.get(name, "0")) for name in names)
    except ValueError:
        rank, size, local = 0, 0, 0
    if not 0 <= rank < size:
        told = ", ".join(f"{name}={environment.get(name)}" for name in names)
        raise ConfigError(
            "what the launcher says of this process cannot be.",
            where=told,
            fix="Start it by torchrun or srun, or unset these variables.",
        )
    return Processes(rank, size, local)


def refuse_several(command: str) -> None:
    """For what one process does: several would do it over each other.

    Raises:
        ConfigError: torchrun or srun started more than one process.
    """
    size = launched().size
    if size > 1:
        raise ConfigError(
            f"it runs in one process, and {size} were started.",
            where=command,
            fix="Start it without torchrun, or with srun --ntasks 1.",
        )


@contextmanager
def joined(*, patience: timedelta = PATIENCE) -> Iterator[Processes]:
    """Joins the processes that were launched with this one, until the end of the block.

    gloo carries what lies on the CPU, NCCL what lies on a GPU.

    Raises:
        ConfigError: the launcher does not say where the first process listens.
        PipelineError: another process ended or did not answer.
    """
    own = launched()
    if own.size == 1:
        yield own
        return
    _meeting_point(os.environ)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    clean = False
    try:
        dist.init_process_group(backend, rank=own.rank, world_size=own.size, timeout=patience)
        yield own
        clean = True
    except PipelineError:
        clean = True
        raise
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        first = str(error).strip().split("\n")[0]
        raise PipelineError(
            f"another process ended or did not answer ({first}).",
            where=f"process {own.rank} of {own.size}",
            fix="The first error in the output of the others says why. The last checkpoint is "
            "intact: run the same command again.",
        ) from error
    finally:
        # NCCL may wait for ever for the one that left; the end of this process tells it as well.
        if dist.is_initialized() and (clean or backend == "gloo"):
            dist.destroy_process_group()


def _meeting_point(environment: Any) -> None:
    """Where the first process listens; srun on one machine needs no telling."""
    if "MASTER_ADDR" not in environment:
        if environment.get("SLURM_STEP_NUM_NODES") != "1":
            raise ConfigError(
                "it is not set, and several machines take part.",
                where="MASTER_ADDR",
                fix="In the batch script: `export MASTER_ADDR="
                '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)`.',
            )
        environment["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_PORT" not in environment:
        job = int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
        environment["MASTER_PORT"] = str(20_000 + job % 20_000)
