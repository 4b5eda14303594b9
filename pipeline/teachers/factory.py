"""Teachers from a user's own code: `factory: "module:function"`, named on purpose.

The function is called as `function(weights: Path, *, taps: Sequence[str], device: str, **args)` and
returns an object with `predict(image: Volume) -> Prediction`, from int16 HU (D, H, W) in RAS+ to
logits (C, D, H, W) on any grid and tapped features, and `describe() -> dict`: everything, as plain
JSON values, that changes numbers besides weights and code.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import file_sha256
from pipeline.data.entries import TeacherEntry
from pipeline.data.volume import Spacing, Volume
from pipeline.errors import PipelineError, TeacherError
from pipeline.teachers.outputs import to_logits
from pipeline.teachers.teacher import Prediction


@dataclass
class FactoryTeacher:
    """A user's object, with its output checked."""

    name: str
    made: Any
    entry: TeacherEntry
    code_sha256: str

    @property
    def spacing_mm(self) -> Spacing | None:
        """What the registry says; None leaves the image on its own grid."""
        return self.entry.spacing_mm

    def predict(self, image: Volume) -> Prediction:
        """Runs the user's code.

        Raises:
            TeacherError: it failed, returned something else than a `Prediction` of float arrays,
                or lacks a tap of the registry.
        """
        try:
            prediction = self.made.predict(image)
        except PipelineError:
            raise
        except Exception as error:
            raise TeacherError(
                f"`predict` failed ({type(error).__name__}: {error}).",
                where=f"teacher {self.name} ({self.entry.factory})",
                fix="Run it by itself on this case to see more.",
            ) from error
        if not isinstance(prediction, Prediction) or prediction.logits.array.ndim != 4:
            raise TeacherError(
                "`predict` must return a Prediction with logits of shape (C, D, H, W).",
                where=f"teacher {self.name} ({self.entry.factory})",
                fix="See docs/registry.md, section on factories.",
            )
        missing = sorted(set(self.entry.taps) - set(prediction.features))
        if missing:
            raise TeacherError(
                f"`predict` returned no features for taps {missing}.",
                where=f"teacher {self.name} ({self.entry.factory})",
                fix="Return them, or remove them from `taps`.",
            )
        features = {tap: _float32(prediction.features[tap]) for tap in self.entry.taps}
        return Prediction(self._logits(prediction.logits), features)

    def _logits(self, outputs: Volume) -> Volume:
        if self.entry.outputs == "logits":
            return _float32(outputs)
        whole = torch.from_numpy(np.ascontiguousarray(outputs.array))[None]
        logits = to_logits(whole, self.entry, where=f"teacher {self.name} ({self.entry.factory})")
        return Volume(logits[0].numpy(), outputs.grid)

    def describe(self) -> Mapping[str, Any]:
        """What the user's object says, the arguments, and a digest of the module's source."""
        return {
            "kind": "factory",
            "factory": self.entry.factory,
            "args": self.entry.args,
            "code_sha256": self.code_sha256,
            "spacing_mm": self.entry.spacing_mm,
            "taps": list(self.entry.taps),
            "says": dict(self.made.describe()),
        }


def load_factory_teacher(
    name: str, entry: TeacherEntry, weights: Path, *, device: torch.device
) -> FactoryTeacher:
    """Imports the module, calls the function.

    Raises:
        TeacherError: a module or function that is not there, or one that fails.
    """
    assert entry.factory is not None
    where = f"teacher {name} ({entry.factory})"
    module_name, function_name = entry.factory.split(":")
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
    except Exception as error:
        raise TeacherError(
            f"cannot be imported ({type(error).__name__}: {error}).",
            where=where,
            fix="The module must be importable: install it, or set PYTHONPATH.",
        ) from error
    try:
        made = function(weights, taps=entry.taps, device=str(device), **entry.args)
    except PipelineError:
        raise
    except Exception as error:
        raise TeacherError(
            f"the factory failed ({type(error).__name__}: {error}).",
            where=where,
            fix="Run it by itself to see more; `args` in the registry are its keyword arguments.",
        ) from error
    source = inspect.getsourcefile(module)
    code = file_sha256(Path(source)) if source else ""
    return FactoryTeacher(name, made, entry, code)


def _float32(volume: Volume) -> Volume:
    return Volume(np.asarray(volume.array, dtype=np.float32), volume.grid)
