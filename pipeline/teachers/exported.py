"""Teachers from exported networks: a TorchScript file, or a torch.export file (`.pt2`).

Such a file is a network and nothing else: orientation, spacing and intensities come from the
registry, and this project's own sliding window runs it.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.data.entries import TeacherEntry
from pipeline.data.patches import Index3, WindowConfig
from pipeline.data.volume import Orientation, Spacing, Volume
from pipeline.errors import TeacherError
from pipeline.networks.windows import SlidingWindow
from pipeline.teachers.outputs import first_output, giving_logits
from pipeline.teachers.teacher import Prediction, first_lines

_NO_LIMIT = 2**31
_HOW = "`network.eval().float().cpu()`, then export it"


@dataclass
class ExportedTeacher:
    """A network without its source, run at the registry's word.

    Attributes:
        network: takes (N, 1, ..) in the entry's orientation, gives (N, C, ..).
        batch_size: windows per pass; speed and memory only.
    """

    entry: TeacherEntry
    network: nn.Module
    form: str
    window: WindowConfig
    batch_size: int
    device: torch.device

    @property
    def spacing_mm(self) -> Spacing | None:
        """The registry's."""
        return self.entry.spacing_mm

    @property
    def axes(self) -> Orientation:
        """How the axes of the array lie that the network sees, its first axis being the slowest."""
        return axes_of(self.entry)

    @property
    def network_window(self) -> Index3:
        """The window along the network's axes."""
        z, y, x = (self.window.shape[axis] for axis in self.axes.axes)
        return z, y, x

    def predict(self, image: Volume) -> Prediction:
        """Int16 HU (D, H, W) at `spacing_mm` -> logits on the same grid; there are no features."""
        turned = self.axes.apply(image)
        logits, _ = SlidingWindow(
            self.network,
            self.window.model_copy(update={"shape": self.network_window}),
            pad_value=self.entry.intensity.air,
            batch_size=self.batch_size,
            device=self.device,
        ).run(self.entry.intensity.apply(turned.array))
        back = self.axes.undo(Volume(logits, turned.grid))
        return Prediction(Volume(back.array, image.grid))

    def describe(self) -> Mapping[str, Any]:
        """What the registry says of preprocessing, and the window."""
        assert self.entry.spacing_mm is not None
        return {
            "kind": "exported",
            "form": self.form,
            "orientation": self.entry.orientation,
            "spacing_mm": list(self.entry.spacing_mm),
            "intensity": self.entry.intensity.model_dump(mode="json"),
            "window": self.window.model_dump(mode="json"),
            "blending": "gaussian, channel logits, float32",
        }


def axes_of(entry: TeacherEntry) -> Orientation:
    """What an entry's `orientation` means; it names an array's axes from the first, that is the
    slowest, on, and `Orientation` from the fastest on."""
    assert entry.orientation is not None
    return Orientation.from_code(entry.orientation[::-1])


class FixedBatch(nn.Module):
    """A program run on exactly `size` windows at a time, for callers that have another number."""

    def __init__(self, program: nn.Module, size: int) -> None:
        super().__init__()
        self.program, self.size = program, size

    def forward(self, batch: Tensor) -> Any:
        """(N, 1, ..) -> (N, C, ..), any N; what the program gives that is no tensor, as it is."""
        parts = []
        for part in torch.split(batch, self.size):
            missing = self.size - part.shape[0]
            padded = torch.cat([part, part.new_zeros(missing, *part.shape[1:])])
            out = first_output(self.program(padded))
            if not isinstance(out, Tensor):
                return out
            parts.append(out[: part.shape[0]])
        return torch.cat(parts)


def load_exported_teacher(
    name: str,
    entry: TeacherEntry,
    path: Path,
    *,
    window: WindowConfig,
    batch_size: int,
    device: torch.device,
) -> ExportedTeacher:
    """Loads the file and runs one window of it.

    A torch.export file of one fixed shape states its own window; `window` then only says how far
    windows overlap.

    Raises:
        TeacherError: neither of the two formats, one that would run more than a network, or a
            network for another device, dtype, window or number of channels.
    """
    where = f"teacher {name}, {path}"
    found = inspect_archive(path, where=where, trusted=entry.trusted)
    network, shape = _load(found, path, batch_size, device, where)
    _check_dtype(network, where)
    if shape is not None and all(isinstance(n, int) for n in shape[2:]) and len(shape) == 5:
        fixed = dict(zip(axes_of(entry).axes, map(int, shape[2:]), strict=True))
        window = window.model_copy(update={"shape": (fixed[0], fixed[1], fixed[2])})
    teacher = ExportedTeacher(entry, network, found.form, window, batch_size, device)
    _try_one_window(teacher, shape, where)
    teacher.network = giving_logits(network, entry, where=f"teacher {name}")
    return teacher


def _load(
    found: Exported, path: Path, batch_size: int, device: torch.device, where: str
) -> tuple[nn.Module, tuple[int | str, ...] | None]:
    """The network and, where the file tells it, the shape of its input (text: not fixed)."""
    if found.form == "torch.export" and "cuda" in found.devices and device.type != "cuda":
        raise TeacherError(
            f"exported on a GPU, so it cannot run on {device.type}.",
            where=where,
            fix=f"Run with --device cuda, or make the file again on the CPU: {_HOW}.",
        )
    try:
        if found.form == "torchscript":
            network: nn.Module = torch.jit.load(path, map_location=device)  # type: ignore[no-untyped-call]
            return network.eval(), None
        with path.open("rb") as file:
            program = torch.export.load(file)
        if device.type not in found.devices:
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        shape = _input_shape(program)
        return FixedBatch(program.module(), _batch_size(program, shape, batch_size)), shape
    except Exception as error:  # damage makes torch raise almost anything
        raise TeacherError(
            f"the {found.form} file cannot be loaded ({first_lines(error)}).",
            where=where,
            fix="It is damaged, or was saved by another version of torch: save it again.",
        ) from error


def _input_shape(program: torch.export.ExportedProgram) -> tuple[int | str, ...] | None:
    wanted = set(program.graph_signature.user_inputs)
    shapes = [
        tuple(n if isinstance(n, int) else str(n) for n in node.meta["val"].shape)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in wanted
    ]
    return shapes[0] if len(shapes) == 1 else None


def _batch_size(
    program: torch.export.ExportedProgram, shape: tuple[int | str, ...] | None, wanted: int
) -> int:
    """The number of windows nearest to the one wanted that the program takes in one pass."""
    if not shape or isinstance(shape[0], int):
        return int(shape[0]) if shape else wanted
    for symbol, limits in program.range_constraints.items():
        if str(symbol) == shape[0]:
            high = wanted if limits.upper > _NO_LIMIT else int(limits.upper)
            return max(int(limits.lower), min(wanted, high))
    return wanted


def _check_dtype(network: nn.Module, where: str) -> None:
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise TeacherError(
                f"its weights are {str(tensor.dtype).removeprefix('torch.')}, not float32.",
                where=where,
                fix=f"Make the file again in single precision: {_HOW}.",
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise TeacherError(
                "the weights hold NaN or infinity.", where=where, fix="Export it again."
            )


def _try_one_window(
    teacher: ExportedTeacher, shape: tuple[int | str, ...] | None, where: str
) -> None:
    """Runs a full batch of noise twice, so that what cannot run is known before any case is."""
    size = teacher.network_window
    generator = torch.Generator().manual_seed(0)
    batch = torch.rand((teacher.batch_size, 1, *size), generator=generator).to(teacher.device)
    takes = "" if shape is None else f"; it takes {' x '.join(map(str, shape))}"
    try:
        with torch.inference_mode():
            out, again = (first_output(teacher.network(batch)) for _ in range(2))
    except Exception as error:
        raise TeacherError(
            f"cannot run {teacher.batch_size} windows of {size} voxels with one channel in float32 "
            f"on {teacher.device.type} ({_last_line(error)}){takes}.",
            where=where,
            fix="Choose another `window.shape` (z, y, x) in the stage's YAML; where the file is "
            f"bound to a GPU or to half precision, make it again: {_HOW}.",
        ) from error
    if not isinstance(out, Tensor) or out.ndim != 5 or tuple(out.shape[2:]) != size:
        what = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise TeacherError(
            f"gives {what} for windows of {tuple(batch.shape)}, not (N, C, ..) of that size.",
            where=where,
            fix="Export a network whose first output is full-size logits, one tensor.",
        )
    if not torch.allclose(out, again, rtol=1e-4, atol=1e-4):
        raise TeacherError(
            "says something else each time it is run.",
            where=where,
            fix=f"It was exported in training mode, with dropout on: {_HOW}.",
        )
    _check_channels(teacher.entry, int(out.shape[1]), where)


def _check_channels(entry: TeacherEntry, num_channels: int, where: str) -> None:
    highest = max(c for channels in entry.organs.values() for c in channels)
    said = num_channels if entry.num_channels is None else entry.num_channels
    if said != num_channels or highest >= num_channels:
        number = "" if entry.num_channels is None else f"says {entry.num_channels}, and "
        raise TeacherError(
            f"the network emits {num_channels} channels; the registry {number}names channel "
            f"{highest} (counted from 0).",
            where=where,
            fix="Correct `num_channels` and `organs`, or name the right weights.",
        )


def _last_line(error: Exception) -> str:
    """TorchScript puts the cause below its own trace, a missing backend above a long list."""
    lines = [line.strip() for line in str(error).strip().split("\n") if line.strip()]
    wanted = [line for line in lines if line.startswith(("RuntimeError", "Could not run"))]
    return (wanted or lines or [type(error).__name__])[0].split(". ")[0][:300]


# What a TorchScript or torch.export file is, found out without running anything it holds.
#
# A TorchScript file can do no more than TorchScript. A torch.export file is data by intention, but
# `torch.export.load` unpickles what the file calls a pickle, follows any dotted name that it gives
# as an operator, evaluates its shape expressions as Python, and loads compiled libraries. So the
# archive is read here first, and only what plain exported networks consist of may pass.

_OPERATOR = re.compile(
    r"torch\.ops\.aten\.\w+(\.\w+)?|_operator\.[a-z]+"
    r"|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)"
)
_SETTINGS = re.compile(r"archive_(format|version)|version|byteorder|\.data/\w+|extra/.*")
_TENSORS = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
_CONFIGS = re.compile(r"data/(weights|constants)/\w+_config\.json")
_SYMBOL = re.compile(r"[a-z]+\d+|L|[A-Z]\w*")
_EXPRESSION = (
    ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.keyword, ast.Subscript,
    ast.Attribute, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip
_AGAIN = "Save the network again: `torch.jit.save`, or `torch.export.save` of an exported program."


@dataclass(frozen=True)
class Exported:
    """What an archive says of itself.

    Attributes:
        devices: types of the devices that a torch.export file is bound to.
    """

    form: Literal["torchscript", "torch.export"]
    devices: frozenset[str]


def inspect_archive(path: Path, *, where: str, trusted: bool) -> Exported:
    """Looks into a file.

    Args:
        trusted: the user vouches for the file: it may hold what runs code when it is loaded.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            # torch looks members up without regard to case: two of one name could hide one.
            if len({name.lower() for name in names}) < len(archive.namelist()):
                raise _refused("an archive that holds two files of one name", where)
            if "constants.pkl" in names and any(name.startswith("code/") for name in names):
                return Exported("torchscript", frozenset())
            if "archive_format" not in names:
                raise _refused(_what_else(names), where)
            found = [] if trusted else list(_unsafe(archive, names))
            programs = [n for name, n in names.items() if name.startswith("models/")]
            devices = {d for name in programs for d in _devices(json.loads(archive.read(name)))}
    except (OSError, zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _refused(f"neither a TorchScript nor a torch.export file ({error})", where) from error
    if found:
        raise TeacherError(
            f"loading this torch.export file would run more than a network: {'; '.join(found)}.",
            where=where,
            fix="If you know where it comes from and want that, say so: `--trust` and the "
            "teacher's name.",
        )
    return Exported("torch.export", frozenset(devices))


def _what_else(names: dict[str, str]) -> str:
    if "data.pkl" in names:
        return (
            "a file of weights or a pickled module (`torch.save`), which says nothing of the "
            "network or runs any code"
        )
    if "serialized_exported_program.json" in names:
        return "a torch.export file of an old format"
    return "neither a TorchScript nor a torch.export file"


def _refused(what: str, where: str) -> TeacherError:
    return TeacherError(f"{what}.", where=where, fix=_AGAIN)


def _unsafe(archive: zipfile.ZipFile, names: dict[str, str]) -> Iterator[str]:
    """Each place of a torch.export archive that may run code."""
    for name, member in names.items():
        if name.startswith("models/"):
            yield from _unsafe_program(json.loads(archive.read(member)))
        elif _CONFIGS.fullmatch(name):
            payloads = json.loads(archive.read(member))["config"].values()
            for path in sorted({p["path_name"] for p in payloads if p["use_pickle"]}):
                data = archive.read(f"{member.rpartition('/')[0]}/{path}")
                yield from _unsafe_pickle(path, data)
        elif name.startswith("data/sample_inputs/"):
            yield from _unsafe_pickle(name, archive.read(member))
        elif not (_SETTINGS.fullmatch(name) or _TENSORS.fullmatch(name)):
            yield f"{name} is no tensor"


def _unsafe_pickle(name: str, data: bytes) -> Iterator[str]:
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever it is, it is not plain tensors
        yield f"{name} is a pickle of more than tensors ({type(error).__name__})"


def _unsafe_program(program: Any) -> Iterator[str]:
    for key, value in _walk(program):
        if key == "target" and isinstance(value, str) and not _OPERATOR.fullmatch(value):
            yield f"it calls {value}"
        elif key in ("as_operator", "as_custom_obj"):
            yield f"it passes on {value}"
        elif key == "expr_str" and not _is_arithmetic(value):
            yield f"it evaluates {value!r}"
        elif key == "guards_code":
            for guard in value:
                if not _is_arithmetic(guard):
                    yield f"it evaluates {guard!r}"


def _is_arithmetic(text: str) -> bool:
    """Sizes, symbols, and functions of them as torch writes them; nothing that reaches further."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, TypeError):
        return False
    for node in nodes:
        match node:
            case ast.Name(id=name) if not _SYMBOL.fullmatch(name):
                return False
            case ast.Attribute(attr=name) if name != "size":
                return False
            case ast.Call(func=function) if not isinstance(function, (ast.Name, ast.Attribute)):
                return False
            case ast.Constant(value=str(name)) if not re.fullmatch(r"\w+", name):
                return False
            case _ if not isinstance(node, _EXPRESSION):
                return False
    return True


def _devices(program: Any) -> Iterator[str]:
    for key, value in _walk(program):
        if key in ("device", "as_device") and isinstance(value, dict) and "type" in value:
            yield str(value["type"])


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of nested JSON."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner)
