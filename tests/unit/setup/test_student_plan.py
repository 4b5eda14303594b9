"""`pipeline plan --student`: what a cohort is proposed, held against nnU-Net's own planner."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipeline.config import load_config
from pipeline.data.registry import load_registry
from pipeline.data.volume import Grid, Index3, Spacing
from pipeline.errors import ConfigError, RegistryError
from pipeline.log import Log
from pipeline.networks.by_name import NetworkConfig, build_network, output_shapes
from pipeline.setup.student_plan import (
    Budget,
    Organ,
    StudentPlan,
    numbers,
    plan_student,
    propose,
    settings_text,
)
from pipeline.setup.topology import Topology, largest_patch, propose_grid
from stages.train_student import TrainStudentConfig
from tests.tiny import RunCli, change_registry

DOCS = Path(__file__).resolve().parents[3] / "docs" / "planning.md"
GB = 1_000_000_000


@dataclass(frozen=True)
class Cohort:
    """Grids of cases: shape and spacing of each kind, and how many there are of it."""

    kinds: Sequence[tuple[Index3, Spacing, int]]
    organs: int = 4

    @property
    def grids(self) -> list[Grid]:
        return [Grid.axis_aligned(s, mm) for s, mm, number in self.kinds for _ in range(number)]


# Sizes and spacings as published: LiTS in nnU-Net issue 856; KiTS19 in issue 230, where a tenth of
# the cases is as fine as 0.5 mm; BTCV in MultiTalent issue 6. The demo's: the median of its cases,
# and how many train.
COHORTS = {
    "demo": Cohort([((38, 64, 72), (7.41176, 5.25937, 5.24714), 32)]),
    "real slices": Cohort([((1, 256, 256), (1.5, 1.5, 1.5), 1232)], organs=3),
    "LiTS": Cohort([((482, 512, 512), (1.0, 0.767578, 0.767578), 131)]),
    "KiTS19": Cohort(
        [((642, 512, 512), (0.5, 0.78125, 0.78125), 42),
         ((107, 512, 512), (3.0, 0.78125, 0.78125), 168)]
    ),
    "BTCV": Cohort([((148, 512, 512), (3.0, 0.759766, 0.759766), 30)], organs=13),
    "5 mm": Cohort([((40, 512, 512), (5.0, 0.7, 0.7), 50)]),
}  # fmt: skip


@cache
def proposed(name: str, gigabytes: int) -> StudentPlan:
    cohort = COHORTS[name]
    grids = cohort.grids
    budget = Budget(gigabytes * GB, "as you said")
    return propose(propose_grid(grids), None, cohort.organs, len(grids), budget)


class TestAsNnunet:
    """Grid, patch, pooling and kernels of nnU-Net 2.8's own planner for the same fingerprint."""

    @pytest.mark.parametrize("name", COHORTS)
    def test_it_plans_the_same(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        grids = COHORTS[name].grids
        grid = propose_grid(grids)
        planner = planner_of(grids, monkeypatch)
        target = planner.determine_fullres_target_spacing()
        assert grid.spacing_mm == pytest.approx(tuple(target), rel=1e-5)
        axes = list(grid.axes)
        spacing = [grid.spacing_mm[a] for a in axes]
        shape = [grid.median_shape[a] for a in axes]
        estimates: dict[str, float] = {}
        theirs = planner.get_plans_for_configuration(
            np.array(spacing), np.array(shape), "", float(np.prod(shape) * len(grids)), estimates
        )
        network = theirs["architecture"]["arch_kwargs"]

        def fits(top: Topology) -> bool:
            """What the planner itself counted, so that the two differ in their rules alone."""
            patch = tuple(np.array([top.patch[a] for a in axes]))
            key = f"{patch}_{tuple(tuple(stride[a] for a in axes) for stride in top.strides)}"
            reference = planner.UNet_reference_val_3d, planner.UNet_reference_val_corresp_bs_3d
            if len(axes) == 2:
                reference = planner.UNet_reference_val_2d, planner.UNet_reference_val_corresp_bs_2d
            return bool(estimates[key] / reference[1] * 2 <= reference[0])

        top, fit = largest_patch(grid, fits)
        assert fit
        assert [top.patch[a] for a in axes] == list(theirs["patch_size"])
        strides = [[stride[a] for a in axes] for stride in top.strides]
        kernels = [[kernel[a] for a in axes] for kernel in top.kernels]
        assert strides == [list(stride) for stride in network["strides"]]
        assert kernels == [list(kernel) for kernel in network["kernel_sizes"]]

    @pytest.mark.parametrize("name", ["LiTS", "BTCV"])
    def test_memory_counted_here_gives_about_the_patch_that_nnunet_gives_8_gb(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of four organs: the loss is no part of nnU-Net's count."""
        grids = COHORTS[name].grids
        grid = propose_grid(grids)
        theirs = planner_of(grids, monkeypatch).get_plans_for_configuration(
            np.array(grid.spacing_mm), np.array(grid.median_shape), "", 1e12, {}
        )
        ours = propose(grid, None, 4, len(grids), Budget(8 * GB, ""))
        ratio = np.prod(ours.training["patch"]) / np.prod(theirs["patch_size"], dtype=float)
        assert 0.8 < ratio <= 1  # BTCV: 48 of 56 slices
        assert ours.training["batch_size"] == theirs["batch_size"] == 2


def docs_row(name: str) -> str:
    """Of the table in docs/planning.md."""
    cohort, found = COHORTS[name], proposed(name, 24)
    training = found.training
    args = training["network"]["args"]
    cells = [math.prod(axis) for axis in zip(*args["strides"], strict=True)]
    kernels = [kernel for kernel in args["kernel_size"] if 1 in kernel]
    held = {setting: choice for setting, choice, _ in found.rows}["a step holds"]
    row = [
        name,
        f"{sum(number for _, _, number in cohort.kinds):,}",
        numbers(found.grid.spacing_mm),
        " x ".join(map(str, found.grid.median_shape)),
        " x ".join(map(str, training["patch"])),
        f"{len(args['strides'])}, {' x '.join(map(str, cells))}",
        f"{kernels[0]} in {len(kernels)}" if kernels else "[3, 3, 3]",
        str(training["batch_size"]),
        f"{training['steps']:,}",
        held,
    ]
    return f"| {' | '.join(row)} |"


class TestWhatIsProposed:
    @pytest.mark.parametrize("name", [name for name in COHORTS if name != "5 mm"])
    def test_the_table_of_the_docs_is_what_is_proposed(self, name: str) -> None:
        assert docs_row(name) in DOCS.read_text(encoding="utf-8").splitlines()

    def test_slices_get_flat_patches_kernels_and_strides(self) -> None:
        training = proposed("real slices", 24).training
        args = training["network"]["args"]
        assert training["patch"] == [1, 256, 256]
        assert all(kernel == [1, 3, 3] for kernel in args["kernel_size"])
        assert all(stride[0] == 1 for stride in args["strides"])
        network = build_network(
            NetworkConfig.model_validate(training["network"]), in_channels=1, out_channels=4
        )
        assert output_shapes(network, training["patch"])[0] == (4, 1, 256, 256)

    def test_a_coarse_axis_keeps_its_spacing_and_gets_flat_kernels(self) -> None:
        found = proposed("BTCV", 24)
        assert found.grid.spacing_mm[0] == 3.0
        assert "z is coarse and has few voxels: its 10th percentile" in found.grid.why
        assert found.training["network"]["args"]["kernel_size"][0] == [1, 3, 3]

    def test_no_head_is_coarser_than_the_smallest_organ(self) -> None:
        grid = propose_grid(COHORTS["demo"].grids)

        def heads(voxels: float) -> Any:
            organ = Organ("adrenal", 1.0, voxels, 3)
            found = propose(grid, organ, 4, 44, Budget(24 * GB, ""))
            assert bool(found.warnings) is (voxels < 64)
            return found.training["network"]["args"].get("deep_supr_num", 0)

        assert [heads(n) for n in (5.0, 60.0, 300.0)] == [0, 1, 2]

    def test_what_it_writes_is_read_and_so_is_nnunets_own_network_in_it(
        self, tiny_registry: Path, tmp_path: Path
    ) -> None:
        registry = load_registry(tiny_registry)
        found, again = (
            plan_student(registry, Budget(24 * GB, ""), (12, 12, 12), Log(quiet=True))
            for _ in range(2)
        )
        text = settings_text(found, registry)
        assert text == settings_text(again, registry)
        (tmp_path / "s.yaml").write_text(text)
        read = load_config(tmp_path / "s.yaml", TrainStudentConfig).training
        assert list(read.patch) == found.training["patch"]
        assert read.augment.preset == "nnunet"
        first, *rest = text[text.index("  # network:") :].splitlines()
        commented = [first, *takewhile(lambda line: line.startswith("  #  "), rest)]
        own = yaml.safe_load("\n".join(line[4:] for line in commented))["network"]
        network = build_network(NetworkConfig.model_validate(own), in_channels=1, out_channels=3)
        stages = len(found.training["network"]["args"]["strides"])
        shapes = output_shapes(network, read.patch)
        assert shapes[0] == (3, *read.patch)
        assert len(shapes) == stages - 1


class TestWhatCannotBePlanned:
    def test_spacings_that_differ_much_are_told_with_their_share(self) -> None:
        near, far = ((64, 64, 64), (3.0, 3.0, 3.0), 8), ((64, 64, 64), (1.0, 3.0, 3.0), 2)
        grids = Cohort([near, far]).grids
        found = propose(propose_grid(grids), None, 4, 10, Budget(24 * GB, ""))
        assert found.grid.far == 0.2
        assert "20% of the cases are resampled by more than 2" in found.warnings[0]
        assert propose_grid(Cohort([near]).grids).far == 0

    def test_slices_among_volumes_are_refused(self) -> None:
        mixed = [*COHORTS["BTCV"].grids[:2], *COHORTS["real slices"].grids[:3]]
        with pytest.raises(ConfigError, match=r"3 of 5 cases are one slice.*`split`"):
            propose_grid(mixed)

    def test_a_spacing_of_nothing_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"--spacing-mm: \(0, 1, 1\) mm must be positive"):
            propose_grid(COHORTS["demo"].grids, (0, 1, 1))

    def test_a_registry_in_which_nothing_trains_is_refused(self, tiny_registry: Path) -> None:
        def nothing_trains(data: dict[str, Any]) -> None:
            for dataset in data["datasets"].values():
                dataset["split"] = {"train": [], "validation": ["case_000"], "test": []}

        registry = load_registry(change_registry(tiny_registry, nothing_trains))
        with pytest.raises(RegistryError, match="no case that trains has a readable header"):
            plan_student(registry, Budget(GB, ""), None, Log(quiet=True))

    def test_memory_that_no_network_fits_is_refused(self) -> None:
        grid = propose_grid(COHORTS["demo"].grids)
        with pytest.raises(ConfigError, match=r"--memory: no network fits: .* 16 MB of 24 MB"):
            propose(grid, None, 4, 44, Budget(24_000_000, ""))

    def test_cases_without_room_for_three_stages_are_refused(self) -> None:
        grid = propose_grid([Grid.axis_aligned((10, 10, 10), (6, 6, 6))])
        with pytest.raises(ConfigError, match=r"10 x 10 x 10 voxels .* three stages.*spacing-mm"):
            propose(grid, None, 4, 44, Budget(24 * GB, ""))


class TestTheCommand:
    def test_it_says_why_and_writes_once(self, tiny_registry: Path, run_cli: RunCli) -> None:
        command = ("plan", "--student", "-r", str(tiny_registry), "--memory", "24 GB", "-q")
        code, out, _ = run_cli(*command)
        assert code == 0
        for row in ("grid", "registry", "smallest organ", "patch", "kernels", "steps"):
            assert f"│ {row}" in out
        path = tiny_registry.parent / "train_student.yaml"
        first = path.read_text()
        assert run_cli(*command)[0] == 0
        path.write_text(first + "# mine\n")
        code, _, error = run_cli(*command[:-1])
        assert "counting the memory of a training step" in error
        assert (code, path.read_text()) == (2, first + "# mine\n")
        assert "it stays as it is. Name another with -o" in error
        code, out, _ = run_cli(*command, "--json", "-o", str(path.with_name("other.yaml")))
        assert code == 0
        assert json.loads(out)["training"] == yaml.safe_load(first)["training"]
        assert path.with_name("other.yaml").read_text() == first

    def test_options_that_would_be_ignored_are_refused(
        self, tiny_registry: Path, run_cli: RunCli
    ) -> None:
        registry = ("-r", str(tiny_registry))
        code, _, error = run_cli("plan", *registry, "--memory", "24 GB")
        assert code == 2
        assert "--memory is of a plan with --student" in error
        code, _, error = run_cli("plan", "--student", *registry, "--quota", "2 TB")
        assert code == 2
        assert "--quota is of a plan of stage one" in error


def planner_of(grids: Sequence[Grid], monkeypatch: pytest.MonkeyPatch) -> Any:
    """nnU-Net's planner on a fingerprint, without its folders; its networks have no values."""
    from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner as d

    with monkeypatch.context() as patch:
        patch.setattr(d, "maybe_convert_to_dataset_name", lambda name: name)
        patch.setattr(d, "load_json", lambda path: {
            "channel_names": {"0": "CT"}, "labels": dict.fromkeys("abcde"),
            "spacings": [list(grid.spacing_mm) for grid in grids],
            "shapes_after_crop": [list(grid.shape) for grid in grids],
            "median_relative_size_after_cropping": 1.0,
        })  # fmt: skip
        patch.setattr(d, "get_filenames_of_train_images_and_targets", lambda *args: {})
        patch.setattr(d, "isfile", lambda path: path.endswith("fingerprint.json"))
        for folder in ("nnUNet_raw", "nnUNet_preprocessed"):
            patch.setattr(d, folder, "")
        found = d.ExperimentPlanner("Dataset001_X")
    estimate = found.static_estimate_VRAM_usage

    def without_values(*args: Any) -> float:
        with torch.device("meta"):
            return float(estimate(*args))

    found.static_estimate_VRAM_usage = without_values
    return found
