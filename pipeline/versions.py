"""Versions of this tool and of the packages that its numbers come from; none of them is loaded."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

TOOL = "organ-distill"
PACKAGES = (
    "torch", "monai", "numpy", "scipy", "zarr", "numcodecs", "dask", "nibabel", "isal", "pydantic",
    "typer", "matplotlib", "universal-pathlib",
)  # fmt: skip
# Of extras: absent is an answer.
OPTIONAL = (
    "distributed", "dask-jobqueue", "nnunetv2", "s3fs", "tensorboard", "mlflow-skinny", "wandb",
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """Package -> its version, None where it is not installed; this tool and Python come first."""
    found: dict[str, str | None] = {TOOL: _version(TOOL), "python": platform.python_version()}
    return found | {name: _version(name) for name in (*PACKAGES, *OPTIONAL)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
