"""Training state and students, written atomically and sealed, read with `weights_only=True`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipeline.config import Config
from pipeline.data.labels import Intensity, LabelSpace
from pipeline.errors import CheckpointError, PipelineError
from pipeline.folder import Folder
from pipeline.networks.by_name import NetworkConfig
from pipeline.networks.tensor_file import load_sealed, read_beside_tensors, save_atomically
from pipeline.student.postprocessing import Rule

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT_VERSION = 1
STATE_VERSION = 2
KEPT = 2


class StudentRecord(Config):
    """All that is needed to use a student, beside its weights."""

    format_version: int = FORMAT_VERSION
    network: NetworkConfig
    head: Literal["softmax", "sigmoid"] = "softmax"
    organs: dict[str, int]
    spacing_mm: tuple[float, float, float]
    intensity: Intensity
    patch: tuple[int, int, int]
    steps: int
    seed: int
    supervision: dict[str, Any]
    validation_dice: dict[str, float | None]
    teachers: dict[str, str]
    trained_on: tuple[str, ...]
    run_digest: str
    postprocessing: dict[str, Rule] = Field(default_factory=dict)
    mirrored: tuple[int, ...] = ()  # axes (0 z, 1 y, 2 x) of augmentation; of before: not known

    @property
    def label_space(self) -> LabelSpace:
        """Organs and ids."""
        return LabelSpace(self.organs)


def save_training(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Writes the checkpoint of a step and keeps the last two.

    A checkpoint of a later step can only be one that could not be read: it goes as well, and so do
    temporary files of a process that was killed while it wrote.
    """
    path = folder / f"step_{step:08d}.pt"
    save_atomically(path, {"format_version": STATE_VERSION, "step": step, **state})
    found = training_checkpoints(folder)
    now = found.index(path)
    unwanted = [*found[: max(0, now + 1 - KEPT)], *found[now + 1 :], *folder.glob(".step_*.tmp")]
    for other in unwanted:
        other.unlink(missing_ok=True)
    return path


def training_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(folder.glob("step_*.pt"))


def load_newest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest readable checkpoint, and what to say of the unreadable ones before it.

    Raises:
        CheckpointError: there are checkpoints and none can be read.
    """
    complaints: list[str] = []
    paths = training_checkpoints(folder)
    for path in reversed(paths):
        try:
            return _checked(load_sealed(path), path), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    if paths:
        raise CheckpointError(
            f"none of {len(paths)} checkpoints can be read: {' '.join(complaints)}",
            where=folder,
            fix="Name another `run` in the settings to start over; nothing was deleted.",
        )
    return None, complaints


def save_student(path: Path, record: StudentRecord, network: nn.Module) -> None:
    """Writes a student that `load_student` reads."""
    state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    save_atomically(path, {"record": record.model_dump_json(), "state": state})


def load_student(path: Folder) -> tuple[StudentRecord, nn.Module]:
    """Reads a student, in evaluation mode on the CPU.

    Raises:
        CheckpointError: absent, damaged, not a plain tensor file, or not a student.
    """
    from pipeline.student.network import build_student

    content = load_sealed(path, unsealed=True)
    with _of_student(path):
        record = _record(content)
        state: dict[str, Tensor] = dict(content["state"])
        network = build_student(record.network, len(record.organs), record.head)
        network.load_state_dict(state, strict=True)
    return record, network.eval()


def read_record(path: Folder) -> StudentRecord:
    """What stands beside a student's weights; neither torch nor MONAI is imported for it.

    Raises:
        CheckpointError: as `load_student`, but for weights that do not fit their network.
    """
    with _of_student(path):
        return _record(read_beside_tensors(path))


def _record(content: Any) -> StudentRecord:
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}")
    return StudentRecord.model_validate_json(content["record"])


@contextmanager
def _of_student(path: Folder) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, PipelineError) as error:
        first = str(error).split("\n")[0]
        raise CheckpointError(
            f"not a student that `pipeline train-student` wrote ({first}).",
            where=path,
            fix="Give the `student.pt` of a finished run, or a run's `best.pt`.",
        ) from error


def _checked(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict) or content.get("format_version") != STATE_VERSION:
        raise CheckpointError(
            f"it is no checkpoint in format {STATE_VERSION}.",
            where=path,
            fix="Go on with the version of organ-distill that wrote it, or begin anew.",
        )
    return content
