"""`pipeline plan`: what stage one will take; with --student, settings that fit the data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pipeline.cli import options as opt
from pipeline.cli.options import Panel, open_log, open_registry, open_settings, parse_size, show
from pipeline.cli.record import recorded
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.setup.student_plan import Budget, StudentPlan


@recorded
def plan(
    registry: opt.RegistryOption = opt.REGISTRY,
    config: opt.ConfigOption = None,
    work: opt.WorkOption = opt.WORK,
    quota: Annotated[
        str | None, Panel.RESULT.option(help='What the work folder may hold, for example "2 TB".')
    ] = None,
    student: Annotated[
        bool,
        Panel.RESULT.option("--student", help="Instead: settings of train-student, from the data."),
    ] = False,
    memory: Annotated[
        str | None,
        Panel.RESULT.option(help='--student: of the GPU, as "24 GB"; default: the one found here.'),
    ] = None,
    spacing_mm: Annotated[
        tuple[float, float, float] | None,
        Panel.RESULT.option(
            metavar="Z Y X", help="--student: grid to plan for; default: the proposed one."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        Panel.RESULT.option(
            "--output", "-o", help="--student: default train_student.yaml beside the registry."
        ),
    ] = None,
    device: opt.DeviceOption = "auto",
    window_batch: opt.WindowBatchOption = 1,
    trust: opt.TrustOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """What stage one will take: bytes, files, time, memory.

    Tries two cases first. With --student: grid, patch, network, batch and steps for a student.
    """
    from pipeline.errors import SpaceError
    from pipeline.setup.plan import make_plan, print_plan
    from pipeline.teachers.load import Teachers
    from stages.cache_teachers import CacheTeachersConfig

    if student:
        _refuse_ignored(config=config, quota=quota, trust=trust, why="of a plan of stage one")
        _plan_student(registry, _budget(memory, device), spacing_mm, output, as_json, quiet)
        return
    _refuse_ignored(
        memory=memory, spacing_mm=spacing_mm, output=output, why="of a plan with --student"
    )
    settings = open_settings(config, CacheTeachersConfig)
    there = open_registry(registry, trust=trust)
    teachers = Teachers(there, settings.window, settings.storage, device, window_batch)
    quota_bytes = None if quota is None else parse_size(quota, "--quota")
    found = make_plan(teachers, settings.splits, work, log=open_log(quiet), quota_bytes=quota_bytes)
    show(found, print_plan, as_json)
    if found.problem:
        raise SpaceError(
            found.problem,
            where=work,
            fix="Make room, choose another --work, or leave out `splits` or `taps`; "
            "cache-teachers refuses to start without --force.",
        )


def _refuse_ignored(*, why: str, **given: object) -> None:
    """Options that would be ignored are refused.

    Raises:
        ConfigError: one of them has a value.
    """
    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if names:
        verb = "is" if len(names) == 1 else "are"
        raise ConfigError(
            f"{', '.join(names)} {verb} {why}.", where="pipeline plan", fix="Leave that out."
        )


def _budget(memory: str | None, device: str) -> Budget:
    """Of the GPU that is named, found, or taken for granted."""
    from pipeline.networks.by_name import pick_device
    from pipeline.setup.student_plan import DEFAULT_MEMORY, Budget

    if memory is not None:
        return Budget(parse_size(memory, "--memory"), "as you said")
    found = pick_device(device)
    if found.type == "cuda":
        from torch.cuda import get_device_properties

        there = get_device_properties(found)
        return Budget(there.total_memory, f"{there.name}, found here")
    return Budget(DEFAULT_MEMORY, "no GPU is found here: taken for granted, --memory says another")


def _plan_student(
    path: Path,
    budget: Budget,
    spacing_mm: tuple[float, float, float] | None,
    output: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    from pipeline.log import print_table
    from pipeline.setup.student_plan import COLUMNS, plan_student, settings_text, write_new

    registry, log = open_registry(path), open_log(quiet or as_json)
    found = plan_student(registry, budget, spacing_mm, log)

    def tell(plan: StudentPlan) -> None:
        print_table("Settings for a student", COLUMNS, plan.rows, num_text=3)
        for warning in plan.warnings:
            log.warn(warning)

    show(found, tell, as_json)
    place = path.with_name("train_student.yaml") if output is None else output
    log.info(write_new(place, settings_text(found, registry)))
