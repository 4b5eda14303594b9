"""`pipeline plan --student`: grid, patch, network, batch and steps that fit a cohort and a GPU.

The rules are those of nnU-Net's planner, with memory counted for a student of this project;
docs/planning.md says where the two differ.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pipeline.data.hounsfield import value_counts
from pipeline.data.nifti import read_label
from pipeline.data.registry import Registry
from pipeline.data.sizes import CaseSize, case_sizes
from pipeline.data.volume import Spacing
from pipeline.errors import ConfigError, PipelineError, RegistryError, counted
from pipeline.folder import replace_file, writing
from pipeline.log import Log, size
from pipeline.setup import topology
from pipeline.setup.init.text import flow
from pipeline.setup.topology import MIN_STAGES, StudentGrid, Topology

if TYPE_CHECKING:
    from pipeline.student.memory import StepMemory

DEFAULT_MEMORY = 24_000_000_000
SPLITS = ("train", "validation")  # nnU-Net's imagesTr
_USABLE = 2 / 3  # of a GPU's memory: the rest is for what pipeline.student.memory does not count
_NUM_LABELS = 8  # of each dataset, read for the sizes of organs
_MOST_HEADS = 2  # beside the full-size one: each costs the loss once more
_STEPS, _MOST_PASSES = 250_000, 1000
_MOST_OF_COHORT = 0.05  # of its voxels in a batch, as nnU-Net
_LITTLE = 0.25  # of the median case in a patch: below, nnU-Net plans a low resolution, too
_FEW = 4  # voxels a side of the smallest organ
_SAME_GRID = 0.01
COLUMNS = ("setting", "choice", "why")
_OWN_SETTINGS = "begin with stages/train_student.cpu.yaml, which has a small network."

# The cohort: what headers say, and a few labels.


@dataclass(frozen=True)
class Organ:
    """The smallest organ of a cohort.

    Attributes:
        ml: median volume; 0 of slices.
        voxels: median on the proposed grid.
        labels: that it was seen in.
    """

    name: str
    ml: float
    voxels: float
    labels: int


def smallest_organ(
    registry: Registry, cases: Sequence[CaseSize], grid: StudentGrid, log: Log
) -> Organ | None:
    """Read from a few labels of each dataset, spread evenly; None where they show none.

    A label that cannot be read is told and left out.
    """
    by_dataset: dict[str, list[CaseSize]] = {}
    for case in cases:
        by_dataset.setdefault(case.source.dataset, []).append(case)
    chosen = [own[n * len(own) // min(_NUM_LABELS, len(own))] for own in by_dataset.values()
              for n in range(min(_NUM_LABELS, len(own)))]  # fmt: skip
    voxels: dict[str, list[float]] = {}
    cell = math.prod(grid.spacing_mm[a] for a in grid.axes)
    with log.progress("labels", len(chosen)) as advance:
        for case in chosen:
            try:
                counts = value_counts(read_label(case.source.label).volume.array)
            except PipelineError as error:
                log.warn(f"the label of {case.source.name} is left out: {error}")
                continue
            share = math.prod(case.native.spacing_mm[a] for a in grid.axes) / cell
            for organ, values in registry.datasets[case.source.dataset].annotated.items():
                number = sum(int(counts[value]) for value in values)
                if number:
                    voxels.setdefault(organ, []).append(number * share)
            advance(case.source.name)
    if not voxels:
        return None
    name = min(voxels, key=lambda organ: (median(voxels[organ]), organ))
    middle = median(voxels[name])
    ml = middle * cell / 1000 if len(grid.axes) == 3 else 0.0
    return Organ(name, ml, middle, len(voxels[name]))


# The proposal: what was chosen, and why.


@dataclass(frozen=True)
class Budget:
    """Memory of one GPU, and who says so."""

    num_bytes: int
    why: str


@dataclass(frozen=True)
class StudentPlan:
    """What is proposed: the settings that differ from the defaults, as they stand in YAML, and rows
    of a setting, the choice and the reason."""

    grid: StudentGrid
    training: Mapping[str, Any]
    rows: Sequence[tuple[str, str, str]]
    warnings: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "grid": {"spacing_mm": list(self.grid.spacing_mm)},
            "training": dict(self.training),
            "rows": [dict(zip(COLUMNS, row, strict=True)) for row in self.rows],
            "warnings": list(self.warnings),
        }


def plan_student(
    registry: Registry, budget: Budget, spacing_mm: Spacing | None, log: Log
) -> StudentPlan:
    """Proposes settings for a registry's cases of training and validation.

    Raises:
        RegistryError: no case with a readable header.
    """
    cases, unreadable = case_sizes(registry, SPLITS)
    for case, error in unreadable.items():
        log.warn(f"{case} is left out: {error}")
    num_training = sum(case.source.split == "train" for case in cases)
    if not num_training:
        raise RegistryError(
            "no case that trains has a readable header.",
            where=registry.path,
            fix="Check the datasets' files and `split`; a phantom is made by `pipeline phantom`.",
        )
    grid = topology.propose_grid([case.native for case in cases], spacing_mm)
    organ = smallest_organ(registry, cases, grid, log)
    log.info("counting the memory of a training step, for smaller and smaller patches")
    found = propose(grid, organ, len(registry.organs), num_training, budget)
    there = registry.grid.spacing_mm
    row = ("registry", numbers(there), "the same grid: nothing to change")
    ratios = [there[a] / grid.spacing_mm[a] for a in grid.axes]
    if any(abs(ratio - 1) > _SAME_GRID for ratio in ratios):
        say = " ".join(f"{mm:g}" for mm in there)
        why = f"another; the proposed one has {math.prod(ratios):.2g} times its voxels. Write it "
        why += f"into `grid.spacing_mm` before cache-teachers, or keep this: --spacing-mm {say}"
        row = ("registry", numbers(there), why)
    datasets = counted(len({case.source.dataset for case in cases}), "dataset")
    stored = [[case.native.shape[a] for case in cases] for a in range(3)]
    by = " x ".join(f"{median(axis):g}" for axis in stored)
    first = ("cases", str(len(cases)), f"train and validation of {datasets}; median {by} voxels")
    return replace(found, rows=[first, found.rows[0], row, *found.rows[1:]])


def propose(
    grid: StudentGrid, organ: Organ | None, num_organs: int, num_training: int, budget: Budget
) -> StudentPlan:
    """Patch, network, batch size and steps for a grid, by what a training step holds in bf16.

    Raises:
        ConfigError: cases too small for a network of three stages, or none that fits.
    """
    usable = budget.num_bytes * _USABLE

    def held(found: Mapping[str, Any], precision: str = "bfloat16") -> StepMemory:
        import torch

        from pipeline.student.memory import step_memory
        from pipeline.student.settings import TrainingConfig

        training = TrainingConfig.model_validate(found)
        return step_memory(training, num_organs, getattr(torch, precision))

    def fits(top: Topology) -> bool:
        few = len(top.strides) < MIN_STAGES  # refused below
        return few or held(settings(top, organ, 2)).total <= usable

    top, fit = topology.largest_patch(grid, fits)
    if len(top.strides) < MIN_STAGES:
        raise ConfigError(
            f"the median case has {_by(grid.median_shape)} voxels on a grid of "
            f"{numbers(grid.spacing_mm)} mm: too few for a network of three stages.",
            where="student grid",
            fix=f"Plan for a finer grid with --spacing-mm, or {_OWN_SETTINGS}",
        )
    two = held(settings(top, organ, 2))
    if not fit:
        raise ConfigError(
            f"no network fits: two patches of {_by(top.patch)} voxels, the smallest, take "
            f"{size(two.total)}, and {size(usable)} of {size(budget.num_bytes)} may be used.",
            where="--memory",
            fix=f"Give more, plan for a coarser grid with --spacing-mm, or {_OWN_SETTINGS}",
        )
    cohort = num_training * math.prod(grid.median_shape) / math.prod(top.patch)  # in patches
    most = max(2, round(_MOST_OF_COHORT * cohort))
    fitting = int((usable - two.weights) / (two.total - two.weights) * 2)
    batch = min(most, max(2, fitting))
    passes = max(1, math.ceil(cohort / batch))
    found = settings(top, organ, batch, steps=min(_STEPS, _MOST_PASSES * passes))
    batch_why, steps_why = "as many as fit", "as nnU-Net"
    if batch == most:
        batch_why = "no more than 5 % of the training voxels" if most > 2 else "the least"
    elif batch == 2:
        batch_why = "two, so that the patch can be large"
    if found["steps"] < _STEPS:
        steps_why = f"1,000 passes of {passes} steps over the training voxels; nnU-Net: 250,000"
    counted_as = f"counted, in bf16; {size(held(found, 'float32').total)} in fp32"
    rows = [
        *_grid_rows(grid, organ),
        ("memory of the GPU", size(budget.num_bytes), f"{budget.why}; a third is kept free"),
        *_network_rows(grid, top, found, organ),
        ("batch size", str(batch), batch_why),
        ("steps", f"{found['steps']:,}", steps_why),
        ("a step holds", size(held(found).total), counted_as),
    ]
    return StudentPlan(grid, found, rows, _warnings(grid, organ))


def settings(
    top: Topology, organ: Organ | None, batch: int, *, steps: int = _STEPS
) -> dict[str, Any]:
    """What differs from a training's defaults."""
    args = topology.dynunet(top, _num_heads(top, organ))
    return {
        "steps": steps,
        "batch_size": batch,
        "patch": list(top.patch),
        "validate_every": max(1, steps // 50),
        "network": {"name": "DynUNet", "args": args},
        "deep_supervision": "deep_supr_num" in args,
        "augment": {"preset": "nnunet"},
        "optimiser": {
            "name": "sgd", "lr": 0.01, "momentum": 0.99, "weight_decay": 0.00003,
            "schedule": "poly", "warmup": 0,
        },
    }  # fmt: skip


def _num_heads(top: Topology, organ: Organ | None) -> int:
    """Outputs beside the full-size one whose cells are no larger than the smallest organ."""
    most = min(_MOST_HEADS, len(top.strides) - 2)
    cells = [math.prod(map(math.prod, top.strides[: head + 1])) for head in range(1, most + 1)]
    return sum(organ is None or cell <= organ.voxels for cell in cells)


def _grid_rows(grid: StudentGrid, organ: Organ | None) -> list[tuple[str, str, str]]:
    rows = [("grid", f"{numbers(grid.spacing_mm)} mm", f"z, y, x; {grid.why}")]
    if organ is None:
        return [*rows, ("smallest organ", "unknown", "no label that was read shows one")]
    seen = f"median of {counted(organ.labels, 'label')}"
    ml = f"{organ.ml:.3g} ml, " if organ.ml else ""
    edge = organ.voxels ** (1 / len(grid.axes))
    why = f"{ml}{organ.voxels:,.0f} voxels, about {edge:.0f} a side; {seen}"
    return [*rows, ("smallest organ", organ.name, why)]


def _network_rows(
    grid: StudentGrid, top: Topology, found: Mapping[str, Any], organ: Organ | None
) -> list[tuple[str, str, str]]:
    args, stages = found["network"]["args"], len(top.strides)
    covered = math.prod(n / m for n, m in zip(top.patch, grid.median_shape, strict=True))
    seen = f"sees {min(1.0, covered):.0%} of the median case, {_by(grid.median_shape)}"
    if covered < _LITTLE:
        seen += "; nnU-Net would plan a coarser grid, too"
    flat = sum(1 in kernel for kernel in top.kernels)
    kernels, why = "[3, 3, 3]", "all spacings are within a factor of 2"
    if flat:
        kernels = f"{list(top.kernels[0])} in {flat} of {stages} stages"
        why = "along a coarse axis from where the others are half as fine"
    if len(grid.axes) < 3:
        why = "cases are one slice: none reaches out of it"
    deepest = [n // c for n, c in zip(top.patch, top.cells, strict=True)]
    heads = args.get("deep_supr_num", 0)
    small = f"cells no larger than {organ.name}" if organ else "at most three"
    return [
        ("patch", _by(top.patch), f"near equal sides in mm, the largest that fits twice; {seen}"),
        (
            "network",
            f"DynUNet, {stages} stages",
            f"nnU-Net's stages in MONAI; the deepest has {_by(deepest)} cells of "
            f"{args['filters'][-1]} features",
        ),
        ("kernels", kernels, why),
        (
            "deep supervision",
            f"{heads + 1} outputs" if heads else "no",
            f"{small}; each costs the loss once more",
        ),
    ]


def _warnings(grid: StudentGrid, organ: Organ | None) -> list[str]:
    found = []
    if grid.far:
        found.append(
            f"{grid.far:.0%} of the cases are resampled by more than 2 along an axis: spacings "
            "differ much. Look at them (`pipeline check`), or split the cohort by spacing."
        )
    if organ is not None and organ.voxels < _FEW ** len(grid.axes):
        found.append(
            f"{organ.name} has about {organ.voxels:.0f} voxels on this grid: too few to learn its "
            "shape. A finer grid: --spacing-mm."
        )
    return found


def numbers(values: Sequence[float]) -> str:
    """[3, 0.767578, 0.767578]."""
    return f"[{', '.join(f'{value:.6g}' for value in values)}]"


def _by(values: Sequence[int]) -> str:
    return " x ".join(str(value) for value in values)


def settings_text(plan: StudentPlan, registry: Registry) -> str:
    """A train_student.yaml, with the reasons as comments."""
    why = {setting: f"{choice}: {reason}" for setting, choice, reason in plan.rows}
    say = {
        "steps": why["steps"],
        "batch_size": f"{why['batch size']}. A step holds {why['a step holds']}",
        "patch": f"{why['patch']}. Memory: {why['memory of the GPU']}",
        "network": f"{why['network']}. Kernels {why['kernels']}",
        "deep_supervision": why["deep supervision"],
        "augment": "preset strong for students that will see another hospital (docs/accuracy.md)",
        "optimiser": "as nnU-Net's",
    }
    lines = [f"# {line}".rstrip() for line in _HEAD.splitlines()]
    grid = f"It is for this grid: `grid.spacing_mm: {numbers(plan.grid.spacing_mm)}`"
    lines += _comment(f"{grid} in {registry.path.name} ({plan.grid.why}).", "")
    lines += _comment(f"Smallest organ: {why['smallest organ']}.", "")
    lines += [line for warning in plan.warnings for line in _comment(warning, "")]
    lines += ["", "training:"]
    for name, value in plan.training.items():
        lines += _comment(f"{say[name]}.", "  ") if name in say else []
        if name != "network":
            lines.append(f"  {name}: {flow(value)}")
            continue
        own = {"name": "PlainConvUNet", "args": topology.plain_conv_unet(value["args"])}
        lines += _network(value, "  ")
        lines += _comment(_OWN, "  ")
        lines += [f"  # {line}" for line in _network(own, "")]
    return "\n".join(lines) + "\n"


def write_new(path: Path, text: str) -> str:
    """Writes a file that is not there yet; what there is to say of it.

    Raises:
        ConfigError: there is one already, and it is another.
        WorkFolderError: it cannot be written.
    """
    if path.exists() or path.is_symlink():
        if path.is_file() and path.read_bytes() == text.encode():
            return f"{path} is as proposed already."
        raise ConfigError(
            "there is such a file already, and it is not this proposal; it stays as it is.",
            where=path,
            fix="Name another with -o, or move that one away.",
        )
    with writing(path):
        replace_file(path, text.encode())
    return f"wrote {path}. Read it through; then: pipeline train-student -c {path}"


_HEAD = """\
Proposed by `pipeline plan --student`; yours to edit. What is not named here is the default:
stages/train_student.yaml.

    pipeline train-student -c train_student.yaml --workers 8        on a GPU: --precision bf16

"""
_OWN = (
    "The same stages as nnU-Net itself builds them (pip install 'organ-distill[networks]'); all of "
    "its decoder is taught, so that it holds more:"
)


def _network(value: Mapping[str, Any], indent: str) -> list[str]:
    lines = [f"{indent}network:", f"{indent}  name: {value['name']}", f"{indent}  args:"]
    return lines + [f"{indent}    {name}: {flow(one)}" for name, one in value["args"].items()]


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
