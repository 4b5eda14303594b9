"""A network as one file that needs none of its source: TorchScript, torch.export, ONNX."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.data.patches import Index3
from pipeline.errors import ConfigError, PipelineError
from pipeline.networks.windows import first_output
from pipeline.student.export.description import INPUT, OUTPUT

NetworkFormat = Literal["torchscript", "torch-export", "onnx"]
FILES: dict[NetworkFormat, str] = {
    "torchscript": "student.ts",
    "torch-export": "student.pt2",
    "onnx": "student.onnx",
}
_TALKATIVE = ("torch.onnx", "onnxscript", "onnx_ir", "monai.data.image_writer")


class FullSizeLogits(nn.Module):
    """A student's network with one output, whatever heads it trains with."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """(N, 1, D, H, W) -> (N, C, D, H, W)."""
        return first_output(self.network(image))


def write_network(
    path: Path, network: nn.Module, patch: Index3, form: NetworkFormat, *, opset: int
) -> None:
    """Writes a network for windows of one shape, any number at a time.

    Args:
        network: in evaluation mode, on the CPU.

    Raises:
        ConfigError: ONNX without its packages.
        PipelineError: the network cannot be written so.
        OSError: the disk refuses it.
    """
    whole = FullSizeLogits(network).eval()
    # Two windows: torch.export takes an axis of one for a constant.
    windows = torch.linspace(-1, 1, 2 * patch[0] * patch[1] * patch[2]).reshape(2, 1, *patch)
    try:
        with quiet(), torch.no_grad():
            match form:
                case "torchscript":
                    traced = torch.jit.trace(whole, (windows,), check_trace=False)  # type: ignore[no-untyped-call]
                    path.write_bytes(as_bytes(torch.jit.save, traced))
                case "torch-export":
                    batch = torch.export.Dim("batch", min=1, max=4096)
                    program = torch.export.export(
                        whole, (windows,), dynamic_shapes=({0: batch},), strict=False
                    )
                    path.write_bytes(as_bytes(torch.export.save, program))
                case "onnx":
                    _write_onnx(path, whole, windows, opset)
    except (PipelineError, OSError):
        raise
    except Exception as error:  # compilers raise almost anything
        first = str(error).strip().split("\n")[0][:300]
        raise PipelineError(
            f"the network cannot be written as {form} ({type(error).__name__}: {first}).",
            where=path.name,
            fix="Another --format may do; `bundle` needs no compiler for its weights.",
        ) from error


def as_bytes(save: Callable[[Any, BytesIO], object], content: Any) -> memoryview:
    """What torch would write to a file: its own writer does not say why a disk refuses it."""
    buffer = BytesIO()
    save(content, buffer)
    return buffer.getbuffer()


def open_network(path: Path, form: NetworkFormat) -> nn.Module:
    """What was written, ready to run on the CPU: (N, 1, ..) -> (N, C, ..)."""
    with quiet():
        match form:
            case "torchscript":
                network: nn.Module = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
                return network
            case "torch-export":
                return torch.export.load(path).module()
            case "onnx":
                return OnnxNetwork(path)


class OnnxNetwork(nn.Module):
    """An ONNX file run by onnxruntime on the CPU."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        _need_onnx()
        import onnxruntime

        self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def forward(self, image: Tensor) -> Tensor:
        """(N, 1, D, H, W) -> (N, C, D, H, W)."""
        (out,) = self._session.run([OUTPUT], {INPUT: image.numpy()})
        return torch.from_numpy(out)


def _write_onnx(path: Path, whole: nn.Module, windows: Tensor, opset: int) -> None:
    _need_onnx()
    import onnx

    program: Any = torch.onnx.export(
        whole, (windows,), dynamo=True, dynamic_shapes=({0: "batch"},), input_names=[INPUT],
        output_names=[OUTPUT], opset_version=opset, verbose=False,
    )  # fmt: skip
    program.save(str(path))
    onnx.checker.check_model(str(path), full_check=True)


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"ONNX needs a package that is not installed ({error.name}).",
            where="--format onnx",
            fix="pip install 'organ-distill[export]'.",
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without other packages' notes on their work and future, which a user cannot act on."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
