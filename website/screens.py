"""Pictures of the command line for the docs: `python -m website.screens FOLDER [NAME ..]`.

The commands are run for good, in FOLDER, and docs/images/screen-<name>.svg shows what a terminal
showed. The demo makes the CTs and trains the teachers (some minutes); the other commands see them
as nnU-Net raw folders and as weights, with two mistakes put in for `pipeline check` to find. What
was recorded stands in FOLDER/<name>.ansi and is used again: take a new FOLDER after a change.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from website import terminal

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
COLUMNS = 110
# Dataset of the demo -> nnU-Net's folder, organ.
_DATASETS = {
    "liver-ct": ("Dataset001_Liver", "liver"),
    "spleen-ct": ("Dataset002_Spleen", "spleen"),
    "kidney-ct": ("Dataset003_Kidneys", "kidneys"),
}
_STUDENT = "training: {patch: [32, 40, 40]}\n"  # the default patch is larger than these CTs


@dataclass(frozen=True)
class Shown:
    """One picture.

    Attributes:
        command: as it is shown and typed: a line with `\\` at its end goes on in the next one.
        exit_code: that it must have.
        before: what is done to the folder first.
        since: how the line begins with which the picture begins; empty: all is shown.
    """

    command: str
    exit_code: int = 0
    before: Callable[[Path], None] = lambda folder: None
    since: str = ""


def lay_out(folder: Path) -> None:
    """nnU-Net raw folders and teachers in place, made from the demo's."""
    demo = folder / "demo"
    for dataset, (name, organ) in _DATASETS.items():
        root = folder / "nnUNet_raw" / name
        images = sorted((demo / "phantom" / dataset / "images").glob("*.nii.gz"))
        for image in images:
            case = image.name.removesuffix(".nii.gz")
            _copy(image, root / "imagesTr" / f"{case}_0000.nii.gz")
            label = demo / "phantom" / dataset / "labels" / image.name
            _copy(label, root / "labelsTr" / image.name)
        content = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, organ: 1},
            "numTraining": len(images),
            "file_ending": ".nii.gz",
        }
        (root / "dataset.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    shutil.copytree(demo / "teachers", folder / "teachers", dirs_exist_ok=True)


def spoil(folder: Path) -> None:
    """What happens to real folders: a stray label value, and one CT under two names."""
    spleen, kidneys = (folder / "nnUNet_raw" / _DATASETS[d][0] for d in ("spleen-ct", "kidney-ct"))
    path = spleen / "labelsTr" / "case_003.nii.gz"
    label = nibabel.load(path)
    values = np.asanyarray(label.dataobj).copy()
    values[:3, :3, :3] = 7
    nibabel.save(nibabel.Nifti1Image(values, label.affine, label.header), path)
    for folder_name, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        _copy(kidneys / folder_name / f"case_001{ending}", kidneys / folder_name / f"copy{ending}")
    (folder / "train_student.yaml").write_text(_STUDENT, encoding="utf-8")


SCREENS: Mapping[str, Shown] = {
    "demo": Shown("pipeline demo demo", since="kinds: what was compared"),
    "init": Shown(
        "pipeline init --organ liver --organ spleen --organ kidneys --spacing-mm 6 6 6 \\\n"
        "  -d liver-ct=nnUNet_raw/Dataset001_Liver -t liver=teachers/liver.pt \\\n"
        "  -d spleen-ct=nnUNet_raw/Dataset002_Spleen -t spleen=teachers/spleen.pt \\\n"
        "  -d kidney-ct=nnUNet_raw/Dataset003_Kidneys -t kidneys=teachers/kidneys.pt",
        before=lay_out,
    ),
    "check": Shown("pipeline check --student train_student.yaml", 2, spoil),
    "plan": Shown('pipeline plan --quota "1 GB"'),
}


def record(name: str, shown: Shown, folder: Path) -> list[str]:
    """What the terminal shows, from a recording if there is one.

    Raises:
        RuntimeError: the command did not end as it should.
    """
    path = folder / f"{name}.ansi"
    if not path.exists():
        shown.before(folder)
        # `pipeline` of this environment, whatever else the PATH has; no width but the terminal's.
        scripts = str(Path(sys.executable).parent)
        kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
        environment = {
            **kept,
            "PATH": f"{scripts}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "TERM": "xterm-256color",
        }
        lines, code = terminal.run(["sh", "-c", shown.command], folder, COLUMNS, environment)
        if code != shown.exit_code:
            said = "\n".join(lines)
            raise RuntimeError(f"{shown.command}\n{said}\nended with {code}")
        path.write_text("\n".join(lines), encoding="utf-8")
    return path.read_text(encoding="utf-8").split("\n")


def draw(name: str, shown: Shown, lines: list[str]) -> str:
    """SVG of a command and what it wrote. It names fonts and fetches none."""
    plain = [Text.from_ansi(line).plain for line in lines]
    begin = next(n for n, line in enumerate(plain) if line.startswith(shown.since))
    lines = ["[..]", *lines[begin:]] if begin else lines
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    first, *rest = shown.command.split("\n")
    console.print(Text(f"$ {first}", style="bold"))
    for line in rest:
        console.print(Text(f"> {line}", style="bold"))
    for line in lines:
        console.print(Text.from_ansi(line), soft_wrap=True)
    form = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    form = form.replace("Fira Code, monospace", "DejaVu Sans Mono, Menlo, Consolas, monospace")
    return console.export_svg(title=f"pipeline {name}", code_format=form, unique_id=name)


def main(folder: Path, names: list[str]) -> None:
    """Draws the screens of these names, or all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, shown in SCREENS.items():
        if not names or name in names:
            lines = record(name, shown, folder)
            path = IMAGES / f"screen-{name}.svg"
            path.write_text(draw(name, shown, lines), encoding="utf-8")
            print(path)  # noqa: T201


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
