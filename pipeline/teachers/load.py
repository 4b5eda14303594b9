"""From a registry entry to a loaded teacher, and the digest that its units are stored under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cache.index import IndexedTeacher
from pipeline.cache.schema import StorageConfig, teacher_inputs
from pipeline.config import digest
from pipeline.data.entries import TeacherEntry
from pipeline.data.patches import WindowConfig
from pipeline.data.registry import Registry
from pipeline.data.weights import FOLDERS, digest_of, stamp_weights
from pipeline.engine.here import once_per_process
from pipeline.errors import TeacherError, named
from pipeline.networks.by_name import pick_device
from pipeline.teachers.teacher import Teacher

if TYPE_CHECKING:
    import torch


def load_teacher(
    name: str,
    entry: TeacherEntry,
    weights: Path,
    *,
    window: WindowConfig,
    batch_size: int,
    device: torch.device,
) -> Teacher:
    """Loads a teacher of any kind.

    Args:
        window: for kinds that this project runs by sliding window.
        batch_size: windows per forward pass; speed and memory only.
    """
    with named(f"teacher {name}"):
        is_folder = entry.kind in FOLDERS
        if not (weights.is_dir() if is_folder else weights.is_file()):
            what = FOLDERS.get(entry.kind, "file")
            raise TeacherError(
                f"the weights do not exist: there is no such {'folder' if is_folder else 'file'}.",
                where=weights,
                fix=f"Correct `weights` in the registry: of kind `{entry.kind}` it is the {what}, "
                "relative to the registry's folder. `pipeline train-teachers` makes those of kind "
                "`checkpoint`.",
            )
        match entry.kind:
            case "checkpoint" | "student":
                from pipeline.teachers.checkpoint import load_checkpoint_teacher

                return load_checkpoint_teacher(
                    name, entry, weights, window=window, batch_size=batch_size, device=device
                )
            case "exported":
                from pipeline.teachers.exported import load_exported_teacher

                return load_exported_teacher(
                    name, entry, weights, window=window, batch_size=batch_size, device=device
                )
            case "monai-bundle":
                from pipeline.teachers.monai_bundle import load_bundle_teacher

                return load_bundle_teacher(name, entry, weights, device=device)
            case "nnunet":
                from pipeline.teachers.nnunet import load_nnunet_teacher

                return load_nnunet_teacher(name, entry, weights, device=device)
            case "factory":
                from pipeline.teachers.factory import load_factory_teacher

                return load_factory_teacher(name, entry, weights, device=device)


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher in memory, and the digest that its units are stored under."""

    teacher: Teacher
    indexed: IndexedTeacher


@dataclass(frozen=True)
class Teachers:
    """The teachers of a registry, loaded when they are first asked for.

    Attributes:
        run: of which a process keeps the teachers in memory, for other objects like this one;
            empty: only this object does.
    """

    registry: Registry
    window: WindowConfig
    storage: StorageConfig
    device: str
    window_batch: int = 1
    run: str = ""

    @cached_property
    def loaded(self) -> Mapping[str, LoadedTeacher]:
        """By name.

        Raises:
            TeacherError: one does not load.
            ConfigError: a precision that the device does not have.
        """
        return once_per_process(self.run, self._load) if self.run else self._load()

    def _load(self) -> Mapping[str, LoadedTeacher]:
        from pipeline.networks.windows import check_precision

        check_precision(self.window.precision, pick_device(self.device))
        return {name: self.open(name) for name in self.registry.teachers}

    def open(self, name: str) -> LoadedTeacher:
        """One of them, loaded anew, and the digest of all that its numbers depend on. Raises as
        `load_teacher`."""
        registry, entry = self.registry, self.registry.teachers[name]
        weights = registry.resolve(entry.weights)
        teacher = load_teacher(
            name, entry, weights, window=self.window, batch_size=self.window_batch,
            device=pick_device(self.device),
        )  # fmt: skip
        stamps = stamp_weights(entry, weights)
        inputs = teacher_inputs(
            entry, teacher.describe(), weights_sha256=digest_of(entry, stamps),
            spacing_mm=registry.grid.spacing_mm, storage=self.storage,
        )  # fmt: skip
        organs = tuple(entry.organs)
        indexed = IndexedTeacher(name, digest(inputs), organs, entry.taps, dict(inputs), stamps)
        return LoadedTeacher(teacher, indexed)

    def describe(self) -> Mapping[str, IndexedTeacher]:
        """What the index says of each: only who loads one can digest it. Raises as `loaded`."""
        return {name: loaded.indexed for name, loaded in self.loaded.items()}
