"""Whether a training of this very setup resumes exactly: killed on purpose, compared bit by bit.

One training runs undisturbed; another of the same settings is killed with SIGKILL at random moments
and goes on with other numbers of loader processes. After every step both note a digest of each
tensor of their checkpoints. Both write to a temporary folder; the user's runs are not touched.
"""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pipeline.cache.store import write_json
from pipeline.data.registry import load_registry
from pipeline.errors import PipelineError
from pipeline.folder import parse_folder
from pipeline.log import Log
from pipeline.network import pick_device
from pipeline.student.checkpoint import training_checkpoints
from pipeline.student.loading import forks_of_a_server
from pipeline.student.processes import Silent
from pipeline.student.speed import SpeedFlags
from pipeline.student.step_notes import (
    first_difference,
    metrics_difference,
    note_step,
    notes_of,
    seconds_per_step,
    steps_of_checkpoints,
)
from pipeline.student.training import train
from pipeline.student_inputs import open_inputs
from stages.train_student import TrainStudentConfig

# Building a network imports the latter, too, once in each process.
PRELOADED = (__name__, "torch._dynamo")
WORKERS = (0, 1, 2)


@dataclass(frozen=True)
class Setup:
    """What is tried.

    Attributes:
        config: `training.steps` is how long the test takes.
        registry: read without its files.
        work: the work folder; read only.
        device: auto, cpu, cuda, cuda:1.
        workers: loader processes of the undisturbed training.
        flags: precision, memory format, compiling.
    """

    config: TrainStudentConfig
    registry: Path
    work: str
    device: str = "auto"
    workers: int = 0
    flags: SpeedFlags | None = None


@dataclass(frozen=True)
class Life:
    """One process of a training, from its start to its end or its kill.

    Attributes:
        setup: what is trained.
        folder: of the training; its checkpoints are gone on from.
        workers: loader processes.
        kill_after: step whose checkpoint is waited for; None lets it live.
        delay_s: seconds from then to the kill.
    """

    setup: Setup
    folder: Path
    workers: int
    kill_after: int | None = None
    delay_s: float = 0.0


@dataclass(frozen=True)
class Row:
    """What came of one life.

    Attributes:
        workers: loader processes.
        resumed_from: step that it went on from; 0 is the beginning.
        reached: last step whose checkpoint it wrote.
        killed: whether SIGKILL ended it.
        difference: from the undisturbed training; empty if there is none.
    """

    workers: int
    resumed_from: int
    reached: int
    killed: bool
    difference: str = ""


def self_test(
    setup: Setup, *, kills: int, seed: int, log: Log, live: Callable[[Life], None] | None = None
) -> list[Row]:
    """Trains straight, then killed and resumed; one row for each process, the straight one first.

    It ends at the first difference, which its last row names.

    Args:
        setup: what is tried, with at least three steps.
        kills: how often the second training is killed; fewer where there are fewer steps.
        seed: of steps, moments and numbers of loader processes.
        log: says what is being done.
        live: what a process does; the tests break it on purpose.

    Raises:
        PipelineError: the training itself failed.
    """
    drawn = random.Random(seed)
    steps = setup.config.training.steps
    live = live or train_until_killed
    with (
        _no_word_of_leaks(),
        tempfile.TemporaryDirectory(prefix="organ-distill-self-test-") as scratch,
    ):
        straight, killed = Path(scratch, "straight"), Path(scratch, "killed")
        log.info(f"self-test: {steps} steps undisturbed")
        rows = [_live(live, Life(setup, straight, setup.workers), straight)]
        pace = seconds_per_step(straight)
        at = sorted(drawn.sample(range(1, steps - 1), min(kills, steps - 2)))
        workers = setup.workers
        for kill_after in (*at, None):
            others = sorted({*WORKERS, setup.workers} - {workers})
            workers = drawn.choice(others) if others else workers
            life = Life(setup, killed, workers, kill_after, drawn.random() * pace)
            end = "to the end" if kill_after is None else f"to a kill after step {kill_after}"
            log.info(f"self-test: {end}, {workers} loader processes")
            rows.append(_live(live, life, straight))
            if rows[-1].difference or rows[-1].reached == steps:
                break
        if rows[-1].difference and not _repeats(live, Life(setup, straight, setup.workers)):
            rows[-1] = replace(
                rows[-1],
                difference=rows[-1].difference + "; two undisturbed trainings differ as well, so "
                "this device or a kernel on it does not repeat itself",
            )
    return rows


def train_until_killed(life: Life) -> None:
    """The work of one process; runs in a child process, which it may kill."""
    try:
        _train(life)
    except PipelineError as error:
        write_json(life.folder / "error.json", {"what": str(error)})
        raise SystemExit(1) from None


@contextmanager
def _no_word_of_leaks() -> Iterator[None]:
    """multiprocessing warns of what killed processes left behind, which it clears away itself."""
    before = os.environ.get("PYTHONWARNINGS")
    quiet = "ignore:resource_tracker:UserWarning"
    os.environ["PYTHONWARNINGS"] = f"{before},{quiet}" if before else quiet
    try:
        yield
    finally:
        os.environ.pop("PYTHONWARNINGS")
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


def _train(life: Life) -> None:
    setup = life.setup
    registry = load_registry(setup.registry, files=False)
    config = setup.config
    found = open_inputs(
        config.training.supervision, registry, parse_folder(setup.work),
        allow_missing=config.allow_missing, log=Silent(),
    )  # fmt: skip
    timers: list[threading.Timer] = []

    def saved() -> None:
        reached = note_step(life.folder)
        if life.kill_after is None or reached < life.kill_after:
            return
        kill = partial(os.kill, os.getpid(), signal.SIGKILL)
        if timers:  # a step was faster than those before: no later than here
            kill()
        else:
            timers.append(threading.Timer(life.delay_s, kill))
            timers[0].start()

    if training_checkpoints(life.folder / "checkpoints"):
        note_step(life.folder)  # killed between a checkpoint and its note
    train(
        config.training,
        registry.label_space,
        found.training,
        found.validation[:1],  # whether validation disturbs training shows on one case
        life.folder,
        taps=found.taps,
        inputs=found.identity,
        log=Silent(),
        device=pick_device(setup.device),
        temperatures=found.temperatures,
        flags=setup.flags,
        workers=life.workers,
        checkpoint_minutes=0,
        saved=saved,
        pictures=False,
    )
    for timer in timers:
        timer.cancel()


def _live(live: Callable[[Life], None], life: Life, straight: Path) -> Row:
    before = notes_of(life.folder)
    began = max(steps_of_checkpoints(life.folder), default=0)
    process = forks_of_a_server(*PRELOADED).Process(target=live, args=(life,))
    process.start()
    process.join()
    code = process.exitcode
    if code not in (0, -signal.SIGKILL) or (code and life.kill_after is None):
        raise _failure(life, code)
    notes = notes_of(life.folder)
    reached = max(steps_of_checkpoints(life.folder), default=0)
    difference = ""
    if life.folder != straight:
        new = {step: note for step, note in notes.items() if step not in before}
        difference = first_difference(straight, new)
        if not difference and code == 0:
            difference = metrics_difference(straight, life.folder)
    return Row(life.workers, began, reached, code != 0, difference)


def _failure(life: Life, code: int | None) -> PipelineError:
    told = life.folder / "error.json"
    if told.exists():
        what = json.loads(told.read_text(encoding="utf-8"))["what"]
        return PipelineError(
            what, where="self-test", fix="Correct that, then try again; nothing was written."
        )
    return PipelineError(
        f"a process of the self-test ended with code {code}.",
        where="self-test",
        fix="Its output is above. Code -9 may mean that the machine has too little memory.",
    )


def _repeats(live: Callable[[Life], None], life: Life) -> bool:
    """Whether a second undisturbed training is the first one again."""
    again = replace(life, folder=life.folder.with_name("again"))
    return not _live(live, again, life.folder).difference
