"""Folders laid out as the pages say, with tiny volumes and networks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml

from tests.blobs import write_blobs
from tests.nnunet_models import Recipe, build_model
from tests.tiny import change_json, change_registry, training_settings
from tests.unit.teachers.made_bundles import write_bundle

ROOT = Path(__file__).resolve().parents[2]
# One draws a bright organ, one a dark one, one the third, in KiTS's order of axes;
# tumours are drawn below.
NNUNET = {
    "liver": Recipe(
        3,
        "Liver",
        labels={"background": 0, "liver": 1, "tumour": 2},
        values=(0, 1, 0, 0),
        num_steps=20,
    ),
    "spleen": Recipe(
        9, "Spleen", labels={"background": 0, "spleen": 1}, values=(0, 0, 1, 0), num_steps=20
    ),
    "kidneys": Recipe(
        40,
        "KiTS",
        spacing=(4.0, 2.0, 2.0),
        code="IPL",
        labels={"background": 0, "kidney": 1, "tumour": 2},
        values=(0, 0, 0, 1),
        num_steps=40,
    ),
}
NUM_CASES = 3
SHAPE = (36, 34, 32)
_STUDENT_STEPS = 2


def build_nnunet(folder: Path) -> Path:
    """What docs/from-nnunet.md begins with: raw data sets, and models trained by nnU-Net."""
    for recipe in NNUNET.values():
        build_model(recipe, folder)
        raw = folder / "nnUNet_raw" / f"Dataset{recipe.number:03d}_{recipe.name}"
        for case in range(NUM_CASES):
            image = raw / "imagesTr" / f"case_{case}_0000.nii.gz"
            drawn = write_blobs(
                image, shape=SHAPE, spacing=recipe.spacing, code=recipe.code,
                seed=10 * recipe.number + case, organs=3,
            )  # fmt: skip
            label = np.array(recipe.values, np.uint8)[drawn]
            if recipe.name != "Spleen":
                lower = np.arange(len(label)) < np.nonzero(label)[0].mean()
                label[lower[:, None, None] & (label == 1)] = 2
            affine = nib.load(image).affine
            nib.save(nib.Nifti1Image(label, affine), raw / "labelsTr" / f"case_{case}.nii.gz")
        change_json(raw / "dataset.json", lambda content: content.update(numTraining=NUM_CASES))
    shutil.rmtree(folder / "nnUNet_preprocessed")
    return folder


def nnunet_folder(built: Path, folder: Path) -> Path:
    """A folder with the three of nnU-Net's, and a scan that nobody labelled."""
    for name in ("nnUNet_raw", "nnUNet_results"):
        (folder / name).symlink_to(built / name)
    write_blobs(folder / "scans" / "ct_0000.nii.gz", shape=SHAPE, organs=3)
    return folder


def workshop(demo: Path, folder: Path) -> Path:
    """A quick demo under the names that most pages use."""
    shutil.copytree(demo, folder, dirs_exist_ok=True)
    students = {"student": "ms_kd", "a": "ms_kd", "b": "marginal"}
    write_students(
        folder, students | {kind: kind for kind in ("ms_kd", "pseudo_label", "marginal")}
    )
    made = folder / "work" / "students" / "kinds" / "ms_kd-seed0" / "student.pt"
    shutil.copy(made, folder / "student.pt")
    scan = next((folder / "phantom" / "multi-organ-ct" / "images").glob("*.nii.gz"))
    for place in ("ct.nii.gz", "scans/ct_0000.nii.gz", "scans/somebody/ct.nii.gz"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(scan, folder / place)
    shutil.copytree(folder / "predictions", folder / "out")
    shutil.copytree(folder / "predictions" / "ms_kd", folder / "out", dirs_exist_ok=True)
    return folder


def write_students(folder: Path, kinds: dict[str, str], **changes: Any) -> None:
    """Settings of students whose training takes no time: file and run -> supervision."""
    for run, kind in kinds.items():
        supervision: dict[str, Any] = {"kind": kind}
        training = training_settings(steps=_STUDENT_STEPS, supervision=supervision, **changes)
        name = "train_student" if run == "student" else run
        content = yaml.safe_dump({"run": run, "training": training})
        (folder / f"{name}.yaml").write_text(content, encoding="utf-8")


def in_its_own_folder(folder: Path) -> None:
    """The demo as it lies after docs/quickstart.md: everything in demo-quick."""
    inside = folder / "demo-quick"
    inside.mkdir()
    for name in ("data_registry.yaml", "cache_teachers.yaml", "work", "phantom", "teachers"):
        (folder / name).rename(inside / name)

    shutil.copytree(inside / "work", folder / "damaged")
    units = sorted((folder / "damaged" / "teachers").glob("liver@*/liver-ct/case_000@*.zarr"))
    chunk = units[0] / "log_odds" / "liver" / "c" / "0" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    next((folder / "damaged" / "cases").glob("liver-ct/case_001@*.zarr/image/c/0/0/0")).unlink()
    shutil.copytree(inside / "work", folder / "other")
    shutil.copy(inside / "data_registry.yaml", folder / "another_registry.yaml")


def with_a_student(folder: Path) -> None:
    """A run named student."""
    runs = folder / "work" / "students"
    shutil.copytree(runs / "kinds" / "ms_kd-seed0", runs / "student")


def without_predictions(folder: Path) -> None:
    """Nobody has predicted into out/."""
    shutil.rmtree(folder / "out")


def without_comparison(folder: Path) -> None:
    """Nobody has compared students under the demo's name."""
    shutil.rmtree(folder / "work" / "students" / "kinds")


def with_slurm_settings(folder: Path) -> None:
    """The YAML that the page shows, and a node's own disk."""
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    for name in ("gpu", "slurm"):
        (found,) = re.findall(rf"```yaml\n(# {name}\.yaml: .*?)```", text, re.DOTALL)
        (folder / f"{name}.yaml").write_text(found, encoding="utf-8")
    (folder / "node").mkdir()


def with_a_bad_teacher(folder: Path) -> None:
    """The pancreas has to be found, and is not."""
    change_registry(
        folder / "data_registry.yaml",
        lambda data: data["teachers"]["pancreas"].update(admission={"dice": 0.3}),
    )


def with_a_bundle(folder: Path) -> None:
    """A bundle whose config would run code is the teacher of the pancreas, of one data set."""
    write_bundle(folder / "teachers" / "zoo", _run_code)
    entry = {"kind": "monai-bundle", "weights": "teachers/zoo", "organs": {"liver": 1, "spleen": 2}}

    def change(data: dict[str, Any]) -> None:
        data["teachers"] = {"pancreas-zoo": entry}
        data["organs"] = {"liver": 1, "spleen": 2}
        data["datasets"] = {n: data["datasets"][n] for n in ("liver-ct", "spleen-ct")}

    change_registry(folder / "data_registry.yaml", change)


def _run_code(config: dict[str, Any]) -> None:
    config["network_def"]["norm"] = "$str('instance')"


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


Layout = Callable[[Path], None]
