"""The commands of stages: `pipeline cache-teachers`, `predict`, `evaluate`, `export`."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli import options as opt
from pipeline.cli.options import Panel, end, one_of, open_log, open_registry, open_settings
from pipeline.cli.record import recorded
from pipeline.errors import ConfigError
from pipeline.folder import Folder, parse_folder


@recorded
def cache_teachers(
    registry: opt.RegistryOption = opt.REGISTRY,
    config: opt.ConfigOption = None,
    work: opt.WorkOption = opt.WORK,
    device: opt.DeviceOption = "auto",
    window_batch: opt.WindowBatchOption = 1,
    force: Annotated[
        bool, Panel.SAFETY.option("--force", help="Start even if it will not fit on the disk.")
    ] = False,
    accept: Annotated[
        list[str] | None,
        Panel.SAFETY.option(
            "--accept",
            help="Go on with this teacher although its Dice is too low.",
            autocompletion=opt.teacher_names,
        ),
    ] = None,
    trust: opt.TrustOption = None,
    executor: Annotated[
        str | None,
        Panel.JOBS.option(
            help="local, slurm, or a Dask scheduler's tcp://HOST:PORT; default: this process.",
            autocompletion=one_of("local", "slurm", "tcp://"),
        ),
    ] = None,
    workers: Annotated[
        int | None,
        Panel.JOBS.option(help="How many to start; default: one per GPU, or per 4 cores.", min=1),
    ] = None,
    slurm_config: Annotated[
        Path | None, Panel.JOBS.option(help="YAML: what each worker's job asks for.")
    ] = None,
    num_parts: Annotated[
        int | None, Panel.JOBS.option(help="Do one of so many parts of the cases.", min=1)
    ] = None,
    part_id: Annotated[
        int | None,
        Panel.JOBS.option(help="Which one, from 0; default: this job's place in its Slurm array."),
    ] = None,
    gate_only: Annotated[
        bool,
        Panel.JOBS.option(
            "--gate-only", help="Judge the teachers, then stop: the job before all parts."
        ),
    ] = False,
    dry_run: opt.DryRunOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Run every teacher over every case once; cache the outputs."""
    from pipeline.engine.choose import open_engine
    from pipeline.engine.here import Execution
    from pipeline.engine.parts import Part, chosen_part
    from pipeline.folder import is_local
    from stages import cache_teachers as stage
    from stages.report import Scope

    settings = open_settings(config, stage.CacheTeachersConfig)
    part = chosen_part(num_parts, part_id, os.environ, gate_only=gate_only)
    if executor is not None:  # workers may stand in other folders
        registry, work = registry.absolute(), work.absolute() if is_local(work) else work
    loaded = open_registry(registry, trust=trust)
    log = open_log(quiet, work, dry_run, writer=part.tag if isinstance(part, Part) else "")
    if dry_run:
        executor = workers = slurm_config = None
    with open_engine(
        executor, workers=workers, slurm_config=slurm_config, device=device, work=work, log=log
    ) as engine:
        execution = Execution(engine=engine, device=device, window_batch=window_batch, force=force)
        scope = Scope(loaded, work, log, tables=not quiet)
        report = stage.run(
            settings, scope, execution, part=part, accept=accept or [], dry_run=dry_run
        )
    end(report)


@recorded
def predict(
    student: Annotated[
        Folder,
        typer.Argument(
            help="student.pt of a finished run.",
            parser=parse_folder,
            metavar="STUDENT",
            autocompletion=opt.student_files,
        ),
    ],
    output: Annotated[Path, Panel.RESULT.option("--output", "-o", help="Folder of label maps.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="NIfTI files, DICOM series, folders of them, or patterns."),
    ] = None,
    registry: Annotated[
        Path | None,
        Panel.INPUT.option(
            "--registry", "-r", help="Instead of IMAGES: its cases, <dataset>/<case>."
        ),
    ] = None,
    split: Annotated[
        list[str] | None, Panel.INPUT.option(help="Of the registry; default: test. Once for each.")
    ] = None,
    fold: opt.FoldOption = None,
    others: Annotated[
        list[Folder] | None,
        Panel.INPUT.option(
            "--with",
            help="Another student.pt, of another seed or fold, to average with. Once for each.",
            parser=parse_folder,
            metavar="STUDENT",
            autocompletion=opt.student_files,
        ),
    ] = None,
    config: opt.ConfigOption = None,
    device: Annotated[
        str,
        Panel.MACHINE.option(
            help="auto, cpu, cuda or cuda:1; several share the cases: cuda:0,cuda:1."
        ),
    ] = "auto",
    window_batch: opt.WindowBatchOption = 1,
    probabilities: Annotated[
        Literal["float16", "float32"] | None,
        Panel.RESULT.option(help="Also write each organ's probability, of this precision."),
    ] = None,
    probabilities_4d: Annotated[
        bool, Panel.RESULT.option("--probabilities-4d", help="One 4D file, not a file per organ.")
    ] = False,
    mirror: Annotated[
        bool,
        Panel.RESULT.option("--mirror", help="Average over mirror images; 2 to 8 times slower."),
    ] = False,
    dicom_seg: Annotated[
        bool, Panel.RESULT.option("--dicom-seg", help="Also a DICOM SEG; IMAGES are DICOM series.")
    ] = False,
    no_postprocessing: Annotated[
        bool, Panel.RESULT.option("--no-postprocessing", help="Keep all parts of each organ.")
    ] = False,
    dry_run: opt.DryRunOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """A CT in, NIfTI or DICOM; label map of all organs out.

    In the geometry of the input.
    """
    from pipeline.student.predicted import Probabilities
    from stages import predict as stage

    if probabilities_4d and probabilities is None:
        raise ConfigError(
            "--probabilities-4d without --probabilities.", fix="Add --probabilities float16."
        )
    layout: Literal["4d", "per-organ"] = "4d" if probabilities_4d else "per-organ"
    if fold is not None and not registry:
        raise ConfigError("--fold without --registry.", fix="Add --registry data_registry.yaml.")
    known = open_registry(registry, files=False, fold=fold) if registry else None
    left: list[str] = []
    held_out = split if fold is None or split else ["validation"]
    inputs = stage.chosen_inputs(images, known, held_out, left)
    log = open_log(quiet)
    for text in left:
        log.warn(text)
    settings = open_settings(config, stage.PredictConfig)
    if no_postprocessing:
        settings = settings.model_copy(update={"postprocessing": False})
    if mirror:
        settings = settings.model_copy(update={"mirror": True})
    execution = stage.PredictExecution(
        device, window_batch,
        probabilities=Probabilities(probabilities, layout) if probabilities else None,
        dicom_seg=dicom_seg, dry_run=dry_run,
    )  # fmt: skip
    students = [student, *(others or [])]
    report = stage.run(settings, students, inputs, output, execution, log=log)
    report.details["not_taken"] = left
    end(report)


@recorded
def evaluate(
    predictions: Annotated[
        Path, typer.Argument(help="Folder with <dataset>/<case>.nii.gz, or a run that predicted.")
    ],
    registry: opt.RegistryOption = opt.REGISTRY,
    config: opt.ConfigOption = None,
    against: Annotated[
        list[Path] | None,
        Panel.INPUT.option(
            help="Another such folder, or a run that predicted: paired differences. Once for each."
        ),
    ] = None,
    folds: Annotated[
        bool, Panel.INPUT.option("--folds", help="Cases of all folds, each as it was held out.")
    ] = False,
    dry_run: opt.DryRunOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Dice, NSD and HD95 per case and organ.

    Written to summary.json and scores.csv, and shown as a table.
    """
    from stages import evaluate as stage

    settings = open_settings(config, stage.EvaluateConfig)
    if folds:
        settings = settings.model_copy(update={"folds": True})
    if against or (predictions / "student.pt").exists():
        from stages.against import predictions_of

        predictions, *others = [predictions_of(path) for path in (predictions, *(against or []))]
    if against:
        from stages.against import check_place

        check_place(predictions)
    opened, log = open_registry(registry), open_log(quiet)
    report = stage.run(settings, opened, predictions, log=log, table=not quiet, dry_run=dry_run)
    if against and not dry_run:
        from stages.against import print_side_by_side, side_by_side, write_side_by_side

        found = side_by_side(settings, opened, predictions, others, log=log)
        written = write_side_by_side(found, predictions)
        if not quiet:
            print_side_by_side(found)
        log.info(f"written: {', '.join(str(path) for path in written)}")
    end(report)


class FormatName(StrEnum):
    """What `--format` takes; `stages.export.FORMATS`, without loading torch."""

    BUNDLE = "bundle"
    TORCHSCRIPT = "torchscript"
    TORCH_EXPORT = "torch-export"
    ONNX = "onnx"


@recorded
def export(
    run: Annotated[
        Folder,
        typer.Argument(
            help="Folder of a finished run, or its student.pt.",
            parser=parse_folder,
            metavar="RUN",
            autocompletion=opt.student_files,
        ),
    ],
    output: Annotated[
        Path, Panel.RESULT.option("--output", "-o", help="A folder per format in it.")
    ],
    formats: Annotated[
        list[FormatName], Panel.RESULT.option("--format", "-f", help="Give it once for each.")
    ],
    check_on: Annotated[
        Path | None,
        Panel.INPUT.option(help="A CT (NIfTI) to hold it against the student on; else --case."),
    ] = None,
    case: Annotated[
        str | None,
        Panel.INPUT.option(
            help="DATASET/CASE of the cache to check on; default: the first one.",
            autocompletion=opt.case_names,
        ),
    ] = None,
    config: opt.ConfigOption = None,
    as_json: opt.JsonOption = False,
    dry_run: opt.DryRunOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """The student for others: MONAI bundle, TorchScript, ONNX.

    Or torch.export. Every format is compared with `predict` on a case.
    """
    from stages import export as stage

    report = stage.run(
        open_settings(config, stage.ExportConfig),
        run,
        stage.Wanted([form.value for form in formats], check_on, case),
        output,
        log=open_log(quiet or as_json),
        dry_run=dry_run,
    )
    if as_json:
        opt.print_json(report.to_json())
    end(report)
