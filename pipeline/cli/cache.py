"""`pipeline cache ...`: what the cache holds, whether it can be trusted, what can go."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.cli import options as opt
from pipeline.cli.options import Panel, open_log, open_registry, open_settings, show
from pipeline.cli.record import recorded
from pipeline.errors import ConfigError, counted
from pipeline.folder import Folder, check_answers, parse_folder
from pipeline.log import size

if TYPE_CHECKING:
    from pipeline.data.registry import Registry
    from pipeline.review.recompute import Recomputed
    from pipeline.review.verify import Verification

cache_app = typer.Typer(
    help="What the cache holds, why, is it sound, what can go.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
CaseOption = Annotated[
    str, Panel.INPUT.option("--case", help="dataset/case.", autocompletion=opt.case_names)
]


@cache_app.command("ls", cls=opt.Command)
def list_(
    registry: opt.RegistryOption = opt.REGISTRY,
    work: opt.WorkOption = opt.WORK,
    as_json: opt.JsonOption = False,
) -> None:
    """Datasets, teachers, cases, bytes.

    What the registry reaches; which students used what.
    """
    from pipeline.review.status import list_cache, print_listing

    show(list_cache(_existing(work), _registry_if_there(registry)), print_listing, as_json)


@cache_app.command(cls=opt.Command)
def why(
    case: Annotated[str, typer.Argument(help="dataset/case.", autocompletion=opt.case_names)],
    registry: opt.RegistryOption = opt.REGISTRY,
    config: opt.ConfigOption = None,
    work: opt.WorkOption = opt.WORK,
    trust: opt.TrustOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Would cache-teachers reuse the units of a case?

    If not: what differs, field by field.
    """
    from pipeline.review.units import plain
    from pipeline.review.why import print_reasons
    from pipeline.review.why import why as explain
    from stages.cache_teachers import CacheTeachersConfig

    settings = open_settings(config, CacheTeachersConfig)
    opened = open_registry(registry, files=False, trust=trust)
    reasons = explain(
        work, opened, case,
        window=settings.window, storage=settings.storage, splits=settings.splits,
    )  # fmt: skip
    if as_json:
        opt.print_json(plain(reasons))
    else:
        print_reasons(reasons)


@cache_app.command(cls=opt.Command)
@partial(recorded, group="cache")
def verify(
    registry: opt.RegistryOption = opt.REGISTRY,
    work: opt.WorkOption = opt.WORK,
    deep: Annotated[
        bool, Panel.RESULT.option("--deep", help="Read every byte: checksums, values, shapes.")
    ] = False,
    everything: Annotated[
        bool, Panel.INPUT.option("--all", help="Also units that no index entry leads to.")
    ] = False,
    repair: Annotated[
        bool, Panel.RESULT.option("--repair", help="Remove damaged units, to be made again.")
    ] = False,
    recompute: Annotated[
        bool,
        Panel.RESULT.option("--recompute", help="Run teachers again on sampled units; compare."),
    ] = False,
    sample: Annotated[int, Panel.RESULT.option(help="Units for --recompute.", min=0)] = 0,
    seed: Annotated[int, Panel.RESULT.option(help="Of the sample.")] = 0,
    tolerance: Annotated[
        float, Panel.RESULT.option(help="For --recompute, in log-odds; one rounding step.", min=0)
    ] = 0.5,
    device: opt.DeviceOption = "auto",
    window_batch: opt.WindowBatchOption = 1,
    trust: opt.TrustOption = None,
    yes: opt.YesOption = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Can the cache be trusted?

    Exit code 1 if a unit is missing, damaged or not reproduced.
    """
    from pipeline.review.units import plain
    from pipeline.review.verify import print_verification
    from pipeline.review.verify import verify as look

    if recompute != (sample > 0):
        raise ConfigError("--recompute and --sample N go together.", fix="Give both, or neither.")
    log = open_log(quiet)
    known = _registry_if_there(registry)
    found = look(_existing(work), known, deep=deep, everything=everything, log=log)
    again: list[Recomputed] = []
    if recompute:
        from pipeline.review.recompute import print_recomputed
        from pipeline.review.recompute import recompute as run_again

        opened = open_registry(registry, trust=trust)
        again = run_again(
            work, opened, sample=sample, seed=seed, device=device, window_batch=window_batch,
            log=log,
        )  # fmt: skip
    if as_json:
        opt.print_json({**plain(found), "recomputed": [one.to_json() for one in again]})
    else:
        typer.echo(found.summary())
        print_verification(found)
        if again:
            print_recomputed(again, tolerance)
    repaired = _repair(work, found, repair, yes)
    wrong = [one for one in again if not one.agrees(tolerance)]
    if wrong or (found.findings and not repaired):
        raise typer.Exit(1)


@cache_app.command(cls=opt.Command)
def diff(
    a: Annotated[Folder, typer.Argument(help="A work folder.", parser=parse_folder, metavar="A")],
    b: Annotated[Folder, typer.Argument(help="Another one.", parser=parse_folder, metavar="B")],
    as_json: opt.JsonOption = False,
) -> None:
    """In which cases, teachers and settings two work folders differ."""
    from pipeline.review.why import diff as compare
    from pipeline.review.why import print_difference

    show(compare(a, b), print_difference, as_json)


@cache_app.command(cls=opt.Command)
@partial(recorded, group="cache")
def gc(
    registries: Annotated[
        list[Path], typer.Argument(help="All registries whose cached units are to stay.")
    ],
    work: opt.WorkOption = opt.WORK,
    grace_hours: Annotated[
        float,
        Panel.SAFETY.option(help="Case units that nobody reaches stay if they are younger.", min=0),
    ] = 24.0,
    dry_run: opt.DryRunOption = False,
    yes: opt.YesOption = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Remove what none of the registries can reach.

    Students are never removed.
    """
    from pipeline.review.gc import find_garbage, print_garbage, remove_garbage

    known = [open_registry(path, files=False) for path in registries]
    garbage = find_garbage(_existing(work), known, grace_hours=grace_hours)
    show(garbage, print_garbage, as_json)
    if garbage.young:
        typer.echo(
            f"gc: {counted(len(garbage.young), 'case unit')} that nobody reaches, younger than "
            f"{grace_hours:g} hours: kept, since a running cache-teachers may be about to index "
            "them (--grace-hours 0 removes them too)",
            err=True,
        )
    if garbage.others:
        typer.echo(
            f"gc: kept what the index has for other registries: {', '.join(garbage.others)}. If "
            "one is given up, remove it, or its entries in index/ of the work folder, first",
            err=True,
        )
    amount = f"{counted(garbage.count, 'thing')}, {size(garbage.total)}"
    if dry_run or not garbage.count:
        typer.echo(f"gc: would remove {amount}" if garbage.count else "gc: nothing to do", err=True)
        return
    if not yes:
        typer.confirm(f"Remove {amount}?", abort=True, err=True)
    number, freed = remove_garbage(work, known, garbage, log=open_log(quiet))
    typer.echo(f"gc: removed {counted(number, 'thing')}, {size(freed)}", err=True)


@cache_app.command(cls=opt.Command)
@partial(recorded, group="cache")
def export(
    output: Annotated[Path, Panel.RESULT.option("--output", "-o", help="Folder to write into.")],
    teacher: Annotated[
        list[str] | None,
        Panel.INPUT.option(
            help="By name; default: all. Once for each.", autocompletion=opt.teacher_names
        ),
    ] = None,
    to: Annotated[Literal["nifti", "nnunet"], Panel.RESULT.option(help="Format.")] = "nifti",
    regions: Annotated[
        bool,
        Panel.RESULT.option("--regions", help="Also organ regions, agreed background, conflicts."),
    ] = False,
    case: Annotated[
        str | None,
        Panel.INPUT.option(
            "--case", help="dataset/case, for nifti.", autocompletion=opt.case_names
        ),
    ] = None,
    registry: opt.RegistryOption = opt.REGISTRY,
    work: opt.WorkOption = opt.WORK,
    quiet: opt.QuietOption = False,
) -> None:
    """What is cached as NIfTI, to be looked at over the CT; or all of it for nnU-Net.

    nifti: log-odds of a case on the student grid. nnunet: labels and experts of all cases together,
    as a raw dataset (OUTPUT: nnUNet_raw/Dataset123_Name).
    """
    from pipeline.review.cached_files import export_nifti, export_nnunet

    if (case is None) != (to == "nnunet") or (regions and case is None):
        raise ConfigError(
            "--to nifti is of one case, and --to nnunet of all, without --regions.",
            where="pipeline cache export",
            fix="Add --case dataset/case, or --to nnunet.",
        )
    known = open_registry(registry, files=to == "nnunet")
    teachers = teacher or list(known.teachers)
    if case is None:
        typer.echo(str(export_nnunet(work, known, teachers, output, open_log(quiet))))
        return
    for path in export_nifti(work, known, case, teachers, output, regions=regions):
        typer.echo(str(path))


def _repair(work: Folder, found: Verification, wanted: bool, yes: bool) -> bool:
    """Removes what is damaged, if that is wanted; whether it was."""
    from pipeline.review.verify import repair

    number = len(found.damaged)
    if not number:
        return False
    if not wanted:
        typer.echo(
            "verify: to repair, add --repair, which removes what is damaged, then run `pipeline "
            "cache-teachers`, which makes it again and nothing else",
            err=True,
        )
        return False
    if not yes and not typer.confirm(f"Remove {number} damaged units?", err=True):
        return False
    removed = repair(work, found)
    typer.echo(
        f"verify: removed {len(removed)} of {number}; run `pipeline cache-teachers` to make them "
        "again",
        err=True,
    )
    return True


def _registry_if_there(path: Path) -> Registry | None:
    """The cache can be looked at without a registry, unless one is named that is not there."""
    if path == opt.REGISTRY and not path.exists():
        return None
    return open_registry(path, files=False)


def _existing(work: Folder) -> Folder:
    check_answers(work)
    if not work.is_dir():
        raise ConfigError("there is no such folder.", where=work, fix="Name one with --work.")
    return work
