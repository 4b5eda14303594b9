"""`pipeline train-student --self-test`: whether a training of this very setup resumes exactly,
killed on purpose and compared bit by bit.

One training runs undisturbed; another of the same settings is killed with SIGKILL at random moments
and goes on with other numbers of loader processes. After every step both note a digest of each
tensor of their checkpoints. Both write to a temporary folder; the user's runs are not touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import secrets
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from pipeline.cache.store import write_json
from pipeline.config import load_config
from pipeline.data.registry import load_registry
from pipeline.errors import CacheMissing, ConfigError, PipelineError
from pipeline.folder import Folder, json_with, parse_folder
from pipeline.log import Log, print_table
from pipeline.networks.by_name import pick_device
from pipeline.networks.tensor_file import load_sealed
from pipeline.student.checkpoint import training_checkpoints
from pipeline.student.dataset import forks_of_a_server
from pipeline.student.distributed import Silent, refuse_several
from pipeline.student.inputs import open_inputs
from pipeline.student.progress import metric_lines, without_timing
from pipeline.student.resume import RunFolder
from pipeline.student.speed import TrainingExecution, check_device
from pipeline.student.training import train
from stages.train_student import TrainStudentConfig

# Building a network imports the others, too, once in each process.
PRELOADED = (__name__, "monai.networks.nets", "torch._dynamo")
WORKERS = (0, 1, 2)


@dataclass(frozen=True)
class Setup:
    """What is tried; `training.steps` of the config is how long the test takes."""

    config: TrainStudentConfig
    registry: Path
    work: str
    execution: TrainingExecution


@dataclass(frozen=True)
class Attempt:
    """One process of a training, which goes on from the folder's checkpoints, from its start to its
    end, or to its kill `delay_s` after the checkpoint of step `kill_after`."""

    setup: Setup
    folder: Path
    workers: int
    kill_after: int | None = None
    delay_s: float = 0.0


@dataclass(frozen=True)
class Row:
    """What came of one attempt, from one step to the last whose checkpoint it wrote; `difference`
    from the undisturbed training is empty if there is none."""

    workers: int
    resumed_from: int
    reached: int
    killed: bool
    difference: str = ""


def train_until_killed(attempt: Attempt) -> None:
    """The work of one process; runs in a child process, which it may kill."""
    try:
        _train(attempt)
    except PipelineError as error:
        write_json(attempt.folder / "error.json", {"what": str(error)})
        raise SystemExit(1) from None


def self_test(
    setup: Setup,
    *,
    kills: int,
    seed: int,
    log: Log,
    train_once: Callable[[Attempt], None] = train_until_killed,
) -> list[Row]:
    """Trains straight, then killed and resumed; one row for each process, the straight one first.

    It ends at the first difference, which its last row names. There are fewer kills where there are
    fewer steps. `train_once` is what a process does; the tests break it on purpose.

    Raises:
        PipelineError: the training itself failed.
    """
    drawn = random.Random(seed)
    steps = setup.config.training.steps
    with (
        _no_word_of_leaks(),
        tempfile.TemporaryDirectory(prefix="organ-distill-self-test-") as scratch,
    ):
        straight, killed = Path(scratch, "straight"), Path(scratch, "killed")
        log.info(f"self-test: {steps} steps undisturbed")
        undisturbed = Attempt(setup, straight, setup.execution.workers)
        rows = [_row(train_once, undisturbed, straight)]
        times = [note["time"] for _, note in sorted(notes_of(straight).items())]
        pace = statistics.median(b - a for a, b in pairwise(times))
        at = sorted(drawn.sample(range(1, steps - 1), min(kills, steps - 2)))
        workers = setup.execution.workers
        for kill_after in (*at, None):
            others = sorted({*WORKERS, setup.execution.workers} - {workers})
            workers = drawn.choice(others) if others else workers
            attempt = Attempt(setup, killed, workers, kill_after, drawn.random() * pace)
            end = "to the end" if kill_after is None else f"to a kill after step {kill_after}"
            log.info(f"self-test: {end}, {workers} loader processes")
            rows.append(_row(train_once, attempt, straight))
            if rows[-1].difference or rows[-1].reached == steps:
                break
        if rows[-1].difference and not _repeats(train_once, undisturbed):
            rows[-1] = replace(
                rows[-1],
                difference=rows[-1].difference + "; two undisturbed trainings differ as well, so "
                "this device or a kernel on it does not repeat itself",
            )
    return rows


@contextmanager
def _no_word_of_leaks() -> Iterator[None]:
    """multiprocessing warns of what killed processes left behind, which it clears away itself."""
    before = os.environ.get("PYTHONWARNINGS", "")
    os.environ["PYTHONWARNINGS"] = f"{before},ignore:resource_tracker:UserWarning".lstrip(",")
    try:
        yield
    finally:
        os.environ["PYTHONWARNINGS"] = before  # empty: as if it were not set


def _train(attempt: Attempt) -> None:
    setup = attempt.setup
    registry = load_registry(setup.registry, files=False)
    config = setup.config
    found = open_inputs(
        config.training.supervision, registry, parse_folder(setup.work),
        allow_missing=config.allow_missing, log=Silent(),
    )  # fmt: skip
    timers: list[threading.Timer] = []

    def saved() -> None:
        reached = note_step(attempt.folder)
        if attempt.kill_after is None or reached < attempt.kill_after:
            return
        kill = partial(os.kill, os.getpid(), signal.SIGKILL)
        if timers:  # a step was faster than those before: no later than here
            kill()
        else:
            timers.append(threading.Timer(attempt.delay_s, kill))
            timers[0].start()

    if training_checkpoints(attempt.folder / "checkpoints"):
        note_step(attempt.folder)  # killed between a checkpoint and its note
    train(
        config.training,
        # Whether validation disturbs training shows on one case.
        replace(found, validation=found.validation[:1]),
        RunFolder(attempt.folder, saved=saved, pictures=False),
        replace(setup.execution, workers=attempt.workers, loggers=(), checkpoint_minutes=0),
        Silent(),
    )
    for timer in timers:
        timer.cancel()


def _row(train_once: Callable[[Attempt], None], attempt: Attempt, straight: Path) -> Row:
    before = notes_of(attempt.folder)
    began = last_step(attempt.folder)
    process = forks_of_a_server(*PRELOADED).Process(target=train_once, args=(attempt,))
    process.start()
    process.join()
    code = process.exitcode
    if code not in (0, -signal.SIGKILL) or (code and attempt.kill_after is None):
        raise _failure(attempt, code)
    notes = notes_of(attempt.folder)
    reached = last_step(attempt.folder)
    difference = ""
    if attempt.folder != straight:
        new = {step: note for step, note in notes.items() if step not in before}
        difference = first_difference(straight, new)
        if not difference and code == 0:
            difference = metrics_difference(straight, attempt.folder)
    return Row(attempt.workers, began, reached, code != 0, difference)


def _repeats(train_once: Callable[[Attempt], None], attempt: Attempt) -> bool:
    """Whether a second undisturbed training is the first one again."""
    again = replace(attempt, folder=attempt.folder.with_name("again"))
    return not _row(train_once, again, attempt.folder).difference


def _failure(attempt: Attempt, code: int | None) -> PipelineError:
    if told := json_with(attempt.folder / "error.json", "what"):
        what = told["what"]
        return PipelineError(
            what, where="self-test", fix="Correct that, then try again; nothing was written."
        )
    return PipelineError(
        f"a process of the self-test ended with code {code}.",
        where="self-test",
        fix="Its output is above. Code -9 may mean that the machine has too little memory.",
    )


STEPS, KILLS = 10, 3


def run_self_test(
    registry: Path,
    config: Path | None,
    work: Folder,
    execution: TrainingExecution,
    *,
    allow_missing: bool,
    steps: int | None,
    seed: int | None,
    log: Log,
) -> None:
    """Tries the user's settings on the user's cache or, where there is none, on a made-up one.

    Raises:
        CacheMissing: settings were named and there is no cache to try them on.
        PipelineError: the resumed training is not the undisturbed one; it names the first tensor.
    """
    refuse_several("train-student --self-test")
    check_device(execution.flags, pick_device(execution.device))
    seed = secrets.randbelow(10**6) if seed is None else seed
    with tempfile.TemporaryDirectory(prefix="organ-distill-made-up-") as scratch:
        if (work / "cases").exists():
            settings = load_config(config, TrainStudentConfig) if config else TrainStudentConfig()
        elif config is None:
            log.info(f"there is no cache in {work}: the self-test makes one up")
            registry, work, settings = _made_up(Path(scratch), log)
        else:
            raise CacheMissing(
                "there is no cache to try these settings on.",
                where=work,
                fix="Run `pipeline cache-teachers` first, or leave out --config to try the "
                "program on made-up data.",
            )
        if allow_missing:
            settings = settings.model_copy(update={"allow_missing": True})
        setup = Setup(settings, registry, str(work), execution)
        _try(setup, steps or STEPS, seed, log)


def refuse_without_self_test(steps: int | None, seed: int | None) -> None:
    """A training takes both from its settings."""
    if steps is not None or seed is not None:
        raise ConfigError(
            "--steps and --seed are of the self-test alone.",
            fix="Set training.steps and training.seed in the settings, or add --self-test.",
        )


def _try(setup: Setup, steps: int, seed: int, log: Log) -> None:
    changes = {"steps": steps, "validate_every": max(1, steps // 3)}
    training = setup.config.training.model_copy(update=changes)
    setup = replace(setup, config=setup.config.model_copy(update={"training": training}))
    log.info(f"self-test: seed {seed} (--seed {seed} repeats it)")
    rows = self_test(setup, kills=KILLS, seed=seed, log=log)
    title = f"Self-test: {steps} steps, seed {seed}"
    columns = ["training", "loader processes", "from step", "to step", "ended by", "equal"]
    print_table(title, columns, [_told(number, row) for number, row in enumerate(rows)])
    if rows[-1].difference:
        raise PipelineError(
            f"the resumed training is not the undisturbed one: {rows[-1].difference}.",
            where="self-test",
            fix="On a GPU, kernels that add in any order differ from run to run; on the CPU this "
            "is a bug: please report it with the table above.",
        )


def _told(number: int, row: Row) -> list[str]:
    return [
        "undisturbed" if number == 0 else f"killed and resumed, process {number}",
        str(row.workers),
        str(row.resumed_from),
        str(row.reached),
        "SIGKILL" if row.killed else "itself",
        "–" if number == 0 else "no" if row.difference else "yes",
    ]


def _made_up(folder: Path, log: Log) -> tuple[Path, Folder, TrainStudentConfig]:
    """The quick demo's cache, and its settings with dropout, which draws random numbers."""
    from pipeline.cli.demo import fill_demo_cache

    registry, _ = fill_demo_cache(folder, quick=True, log=log)
    settings = load_config(folder / "train_student_ms_kd.yaml", TrainStudentConfig)
    network = settings.training.network
    network = network.model_copy(update={"args": {**network.args, "dropout": 0.1}})
    training = settings.training.model_copy(update={"network": network})
    return registry.path, folder / "work", settings.model_copy(update={"training": training})


# What a training was after each of its steps, by digest, and where two trainings first differ.


def note_step(folder: Path) -> int:
    """Digests of the newest checkpoint of a run, beside it; returns its step."""
    state = load_sealed(training_checkpoints(folder / "checkpoints")[-1])
    note = {"time": time.time(), "digests": dict(state_digests(state))}
    write_json(folder / "notes" / f"{state['step']:08d}.json", note)
    return int(state["step"])


def state_digests(state: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of every tensor, however deep; of other values name and text."""
    if isinstance(state, torch.Tensor):
        flat = state.detach().cpu().contiguous().reshape(-1)
        digest = hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()
        yield name, f"{state.dtype} {tuple(state.shape)} {digest}"
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from state_digests(value, f"{name}.{key}".lstrip("."))
    elif isinstance(state, (list, tuple)):
        for number, value in enumerate(state):
            yield from state_digests(value, f"{name}[{number}]")
    else:
        yield name, repr(state)


def last_step(folder: Path) -> int:
    """Of the checkpoints that are kept; 0 without one."""
    paths = training_checkpoints(folder / "checkpoints")
    return max((int(path.stem.removeprefix("step_")) for path in paths), default=0)


def notes_of(folder: Path) -> dict[int, Mapping[str, Any]]:
    """Step -> `time` and `digests` of its checkpoint."""
    paths = sorted(folder.glob("notes/*.json"))
    return {int(path.stem): json.loads(path.read_text(encoding="utf-8")) for path in paths}


def first_difference(straight: Path, notes: Mapping[int, Mapping[str, Any]]) -> str:
    """The first step, and the first tensor there, in which notes differ from those of a run that
    nothing disturbed; empty if all is equal."""
    expected = notes_of(straight)
    for step, note in sorted(notes.items()):
        ours, theirs = note["digests"], expected[step]["digests"]
        for name in {**theirs, **ours}:
            if ours.get(name) != theirs.get(name):
                return f"{name} after step {step}"
    return ""


def metrics_difference(straight: Path, killed: Path) -> str:
    """The first line of metrics.jsonl that differs but for its times; empty if none does."""
    ours, theirs = (
        without_timing(metric_lines(run / "metrics.jsonl")) for run in (killed, straight)
    )
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False), start=1):
        if one != other:
            return f"metrics.jsonl, line {number}"
    return "" if len(ours) == len(theirs) else "the number of lines in metrics.jsonl"
