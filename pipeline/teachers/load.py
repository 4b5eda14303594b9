"""From a registry entry to a loaded teacher."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.data.entries import TeacherEntry
from pipeline.errors import named
from pipeline.networks.windows import WindowConfig
from pipeline.teachers.checkpoint import load_checkpoint_teacher
from pipeline.teachers.exported import load_exported_teacher
from pipeline.teachers.factory import load_factory_teacher
from pipeline.teachers.monai_bundle import load_bundle_teacher
from pipeline.teachers.nnunet import load_nnunet_teacher
from pipeline.teachers.teacher import Teacher


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
        name: as in the registry.
        entry: its registry entry.
        weights: where its weights are.
        window: for kinds that this project runs by sliding window.
        batch_size: windows per forward pass; speed and memory only.
        device: where it runs.

    Raises:
        TeacherError: see the kinds' own loaders.
    """
    with named(f"teacher {name}"):
        match entry.kind:
            case "checkpoint":
                return load_checkpoint_teacher(
                    name, entry, weights, window=window, batch_size=batch_size, device=device
                )
            case "exported":
                return load_exported_teacher(
                    name, entry, weights, window=window, batch_size=batch_size, device=device
                )
            case "monai-bundle":
                return load_bundle_teacher(name, entry, weights, device=device)
            case "nnunet":
                return load_nnunet_teacher(name, entry, weights, device=device)
            case "factory":
                return load_factory_teacher(name, entry, weights, device=device)
