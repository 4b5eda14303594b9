"""The entries of docs/datasets.md, on synthetic folders under the published names."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli import app as cli
from pipeline.data.registry import load_registry

DOCS = Path(__file__).resolve().parents[4] / "docs" / "datasets.md"
FILES = {
    "lits": [
        f"LiTS/Training Batch {batch}/{kind}-{case}.nii"
        for batch, case in ((1, 0), (2, 28))
        for kind in ("volume", "segmentation")
    ],
    "kits": [
        f"kits23/dataset/case_{case}/{name}.nii.gz"
        for case in ("00000", "00400")
        for name in ("imaging", "segmentation", "instances/kidney_instance-1_annotation-1")
    ],
    "msd-pancreas": [
        f"Task07_Pancreas/{folder}/{name}.nii.gz"
        for folder in ("imagesTr", "labelsTr")
        for name in ("pancreas_001", "pancreas_004", "._pancreas_001")
    ],
    "msd-spleen": [
        f"Task09_Spleen/{folder}/{name}.nii.gz"
        for folder in ("imagesTr", "labelsTr")
        for name in ("spleen_2", "spleen_10")
    ],
    "btcv": [
        f"RawData/Training/{folder}/{folder}{case}.nii.gz"
        for folder in ("img", "label")
        for case in ("0001", "0040")
    ],
}
DECATHLON = {
    "Task07_Pancreas": ("pancreas", {"0": "background", "1": "pancreas", "2": "cancer"}),
    "Task09_Spleen": ("spleen", {"0": "background", "1": "spleen"}),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)


def documented() -> dict[str, Any]:
    """The head of a registry, and all its datasets."""
    head, *parts = [yaml.safe_load(text) for text in blocks("yaml")]
    datasets = {name: entry for part in parts for name, entry in part["datasets"].items()}
    return {**head, "datasets": datasets}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    for name in (name for names in FILES.values() for name in names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for task, (_, labels) in DECATHLON.items():
        names = [p.name for p in (tmp_path / task / "imagesTr").iterdir() if p.name[0] != "."]
        training = [
            {"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names
        ]
        content = {"modality": {"0": "CT"}, "labels": labels, "licence": "CC-BY-SA 4.0",
                   "training": training, "test": ["./imagesTs/a.nii.gz"]}  # fmt: skip
        (tmp_path / task / "dataset.json").write_text(json.dumps(content))
    return tmp_path


def test_every_entry_loads_and_finds_its_cases(published: Path) -> None:
    path = published / "documented.yaml"
    path.write_text(yaml.safe_dump(documented(), sort_keys=False))
    registry = load_registry(path)
    assert set(registry.datasets) == set(FILES)
    for name in FILES:
        assert len(registry.cases(name)) == 2, name


def test_the_documented_command_writes_these_entries(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(published)
    program, *arguments = shlex.split(blocks("sh")[0].replace("\\\n", " "))
    assert program == "pipeline"
    shown = CliRunner().invoke(cli.app, arguments)
    assert shown.exit_code == 0, f"{shown.output} {shown.exception}"
    written, wanted = load_registry(published / "data_registry.yaml"), documented()
    assert written.organs == wanted["organs"]
    (published / "documented.yaml").write_text(yaml.safe_dump(wanted))
    by_hand = load_registry(published / "documented.yaml")
    aside = {"source": "", "licence": ""}
    for name, entry in by_hand.datasets.items():
        made = written.datasets[name]
        assert made.model_copy(update=aside) == entry.model_copy(update=aside), name
