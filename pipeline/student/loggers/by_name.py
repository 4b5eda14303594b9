"""Loggers by the names that the command line takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

from pipeline.errors import ConfigError
from pipeline.student.loggers.mlflow import MlflowLogger
from pipeline.student.loggers.run_logger import RunLogger
from pipeline.student.loggers.tensorboard import TensorBoardLogger
from pipeline.student.loggers.wandb import WandbLogger

LOGGERS: dict[str, Callable[[], RunLogger]] = {
    "tensorboard": TensorBoardLogger,
    "mlflow": MlflowLogger,
    "wandb": WandbLogger,
}


def open_loggers(names: Sequence[str]) -> list[RunLogger]:
    """Loggers of these names, each once; nothing is written yet.

    Raises:
        ConfigError: no such logger, or its package is not installed.
    """
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        if name not in LOGGERS:
            raise ConfigError(
                f"there is no logger {name!r}.",
                where="--logger",
                fix=f"Choose among {', '.join(LOGGERS)}; metrics.jsonl is always written.",
            )
        if find_spec(name) is None:  # each is named as the package that it needs
            raise ConfigError(
                f"logger {name} needs a package that is not installed.",
                where="--logger",
                fix=f"Install it: pip install 'organ-distill[{name}]'.",
            )
    return [LOGGERS[name]() for name in wanted]
