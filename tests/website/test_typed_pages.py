"""What the pages show is typed, in a real shell, and does what they say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from pipeline.cli.demo import STUDENTS
from tests.tiny import change_registry
from tests.website.changes import PAGES
from tests.website.command_lines import command_lines, shell_blocks
from tests.website.folders import build_nnunet, nnunet_folder, workshop, write_students
from tests.website.reader import ROOT, Reader, Shell, warm_shell
from tests.website.tutorials import TUTORIALS

# A command has 25 minutes: elsewhere this machine may be busy with other tests.
pytestmark = pytest.mark.timeout(1800)
DOCS = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
PAGE = {page.name: page for page in DOCS}
# What the pages say that is written.
DEMO = ("data_registry.yaml", "phantom/*/images/*.nii.gz", "teachers/*.pt", "work",
        "predictions/*/summary.json", "kinds/validation.html", "overlay.png")  # fmt: skip
CACHE = ("cases/*/*@*.zarr", "teachers/*@*/*/*@*.zarr", "index/*", "reports/cache-teachers.json",
         "reports/admission.json", "events.jsonl")  # fmt: skip
RUN = ("config.json", "checkpoints/*", "best.pt", "metrics.jsonl", "progress.png", "student.pt",
       "finished.json")  # fmt: skip


@pytest.fixture(scope="module")
def shell() -> Iterator[Shell]:
    with warm_shell() as found:
        yield found


@pytest.fixture(scope="module")
def demo(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> tuple[Reader, str]:
    """Somebody in the middle of the page, and what was printed: the demo has run."""
    folder = tmp_path_factory.mktemp("quickstart")
    reader = Reader(PAGE["quickstart.md"], folder, shell, TUTORIALS["quickstart.md"])
    said = reader.type_next()
    shutil.copytree(folder / "demo-quick", folder / "as-the-demo-left-it")
    return reader, said


@pytest.fixture(scope="module")
def quickstart(demo: tuple[Reader, str]) -> Reader:
    return demo[0]


@pytest.fixture(scope="module")
def nnunet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_nnunet(tmp_path_factory.mktemp("nnunet"))


@pytest.mark.slow
class TestDemo:
    def test_it_ends_with_a_table_and_says_where_everything_is(
        self, demo: tuple[Reader, str]
    ) -> None:
        folder, printed = demo[0].folder / "as-the-demo-left-it", demo[1]
        for word in ("ms_kd", "pseudo_label", "marginal", "teachers", "liver", "pancreas", "mean"):
            assert word in printed
        for told in ("demo-quick/overlay.png", "one seed", "difference to marginal"):
            assert told in printed
        for picture in ("overlay.png", "kinds/validation.png"):
            assert (folder / picture).stat().st_size > 20_000
        compared = json.loads((folder / "kinds" / "validation.json").read_text())
        assert [entry["name"] for entry in compared["configurations"]] == list(STUDENTS)
        for kind in STUDENTS:
            run = folder / "work" / "students" / "kinds" / f"{kind}-seed0"
            assert_there(run, "student.pt", "progress.png")
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))

    def test_predictions_lie_on_the_grid_of_their_images(self, quickstart: Reader) -> None:
        folder = quickstart.folder / "as-the-demo-left-it"
        found = sorted((folder / "predictions" / "ms_kd").rglob("*.nii.gz"))
        assert found
        for path in found:
            label = nib.load(path)
            image = nib.load(folder / "phantom" / path.parent.name / "images" / path.name)
            assert label.shape == image.shape
            np.testing.assert_array_equal(label.affine, image.affine)
            assert set(np.unique(np.asarray(label.dataobj))) <= {0, 1, 2, 3, 4}

    def test_a_second_run_does_nothing_again(self, demo: tuple[Reader, str]) -> None:
        reader, printed = demo
        before = files_with_times(reader.folder / "demo-quick")
        again = reader.shell.run("pipeline demo demo-quick --quick", reader.folder)
        assert again.returncode == 0, again.stderr
        assert files_with_times(reader.folder / "demo-quick") == before
        table = [line for line in again.stdout.splitlines() if line.startswith("│")]
        assert table
        # What was printed has the standard error behind it.
        assert table == [x for x in printed.splitlines() if x.startswith("│")][: len(table)]

    def test_a_full_demo_does_not_write_over_a_quick_one(self, quickstart: Reader) -> None:
        registry = quickstart.folder / "demo-quick" / "data_registry.yaml"
        before = registry.read_bytes()
        done = quickstart.shell.run("pipeline demo demo-quick", quickstart.folder)
        assert done.returncode == 2
        assert "another size" in done.stderr
        assert registry.read_bytes() == before


def files_with_times(folder: Path) -> dict[str, int]:
    """Networks, NIfTI files and chunks (which have no suffix): reports and tables are made anew."""
    kept = (path for path in folder.rglob("*") if path.suffix in {".pt", ".gz", ""})
    return {str(path): path.stat().st_mtime_ns for path in kept if path.is_file()}


@pytest.mark.slow
def test_quickstart(quickstart: Reader) -> None:
    folder = quickstart.folder
    demo = folder / "demo-quick"
    run = demo / "work" / "students" / "ms_kd"
    (folder / "imagesTs").mkdir()
    (folder / "imagesTs" / "a_0000.nii.gz").touch()
    with quickstart as reader:
        assert_there(demo, *DEMO)
        assert "dataset liver-ct: 3 cases, liver" in reader.type_next()
        assert_there(folder, "my_registry.yaml")
        reader.type_next()  # R
        assert "0 errors" in reader.type_next()
        assert "0 done, 4 already there" in reader.type_next()
        said = reader.type_next()
        assert "cache-teachers: 0 done, 70 already there" in said
        assert "Teachers against the labels" in said
        assert_there(demo / "work", *CACHE)
        said = reader.type_next()
        assert '"not_done": []' in said
        reader.type_next()
        assert_there(folder / "inspection", "cohort.csv", "multi-organ-ct/case_001/figure.png")
        reader.type_next()
        assert_there(run, *RUN)
        assert "difference to marginal" in reader.type_next()
        assert_there(demo / "kinds", "validation.html", "validation.png", "validation_scores.csv")
        reader.type_next()
        assert_there(
            folder / "demo-quick" / "out",
            *(f"multi-organ-ct/case_001{end}" for end in (".nii.gz", ".json")),
            *(f"multi-organ-ct/labels.{end}" for end in ("itksnap.txt", "ctbl")),
        )
        assert "NSD" in reader.type_next()
        assert_there(demo / "out", "summary.json", "scores.csv")
        reader.type_next()
        assert_there(run, "report.html")
        reader.type_next()
        assert (folder / "named" / "a.nii.gz").is_symlink()


@pytest.mark.slow
def test_from_nnunet(shell: Shell, nnunet: Path, tmp_path: Path) -> None:
    folder = nnunet_folder(nnunet, tmp_path)
    write_students(folder, {"student": "ms_kd"})
    page, work = PAGE["from-nnunet.md"], folder / "work"
    with Reader(page, folder, shell, TUTORIALS["from-nnunet.md"]) as reader:
        reader.type_next()
        (entry,) = re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
        assert entry in (folder / "data_registry.yaml").read_text("utf-8")
        change_registry(folder / "data_registry.yaml", as_the_page_advises)
        said = reader.type_next()
        assert "0 errors" in said
        assert "Plan of stage one" in said
        said = reader.type_next()
        assert "Teachers against the labels" in said
        assert "POOR" not in said
        reader.type_next()
        assert_there(folder / "inspection", "cohort.csv")
        reader.type_next()
        assert_there(work / "students" / "student", *RUN)
        said = reader.type_next()
        assert_there(folder / "out", "ct_0000.nii.gz", "*-ct/*.nii.gz", "summary.json")
        assert_there(work / "students" / "student", "report.html")
        reader.type_next()
        assert_there(folder / "nnUNet_raw" / "Dataset501_Organs", "dataset.json", "labelsTr/*.gz")


def as_the_page_advises(data: dict[str, Any]) -> None:
    """Test cases to score the student on, and faster teachers."""
    for dataset in data["datasets"].values():
        dataset["split"]["test"] = 0.2
    for teacher in data["teachers"].values():
        teacher["nnunet"] = {**teacher.get("nnunet", {}), "mirroring": False}


@pytest.mark.slow
def test_readme(shell: Shell, nnunet: Path, tmp_path: Path) -> None:
    folder = nnunet_folder(nnunet, tmp_path)
    write_students(folder, {"student": "ms_kd", "a": "ms_kd", "b": "marginal"})
    with Reader(PAGE["README.md"], folder, shell, TUTORIALS["README.md"]) as reader:
        said = reader.type_rest()
    assert "POOR" not in said
    assert "paired" in said
    assert_there(folder / "ab", "validation.html")
    assert_there(folder, "labels/ct_0000.nii.gz", "out/liver-ct/*.nii.gz", "out/summary.json")


def assert_there(folder: Path, *patterns: str) -> None:
    assert not [pattern for pattern in patterns if not list(folder.glob(pattern))], folder


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_page(name: str, quickstart: Reader, tmp_path: Path) -> None:
    page = PAGES[name]
    folder = workshop(quickstart.folder / "as-the-demo-left-it", tmp_path)
    if page.layout:
        page.layout(folder)
    with Reader(PAGE[name], folder, quickstart.shell, page.changes) as reader:
        said = reader.type_rest()
    assert_there(folder, *page.written)
    assert not [words for words in page.said if words not in said]


def test_each_page_that_shows_shell_commands_is_typed() -> None:
    shown = {page.name for page in DOCS if list(shell_blocks(page))}
    assert {*TUTORIALS, *PAGES} == shown


def test_commands_that_are_to_be_typed_stand_in_shell_blocks() -> None:
    """Those of an indented block, or of a fence without its language, nobody would type."""
    for page in DOCS:
        lines = [line for line in command_lines(page) if line.whole]
        assert len(lines) == sum(len(block.commands) for block in shell_blocks(page)), page.name


def test_what_is_not_typed_is_executed_where_it_is_said_to_be() -> None:
    changes = [c for page in PAGES.values() for c in page.changes]
    changes += [c for some in TUTORIALS.values() for c in some]
    assert sum(c.tested is not None for c in changes) > 5
    for change in changes:
        if change.tested:
            file, word = change.tested
            assert word in (ROOT / file).read_text(encoding="utf-8"), change
