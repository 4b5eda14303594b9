"""One family of errors; each knows its exit code.

A message says what happened, where (case, teacher, path, YAML line) and what to do about it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any


class PipelineError(Exception):
    """Something the user can act on; printed as one paragraph, without a traceback.

    Args:
        what: what is wrong, as a sentence.
        where: the case, teacher, path or YAML line it was found at.
        fix: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, fix: str = "") -> None:
        self.what = _writable(what)
        self.where = None if where is None else _writable(str(where))
        self.fix = _writable(fix)
        super().__init__(self.what, self.where, self.fix)

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process may raise it: it arrives whole."""
        return partial(type(self), where=self.where, fix=self.fix), (self.what,)

    def at(self, place: str) -> None:
        """Names a place, a case or a teacher, that is not named yet: a path alone does not say
        whose it is."""
        if place not in (self.where or self.what):
            self.where = place if self.where is None else f"{place}, {self.where}"
            self.args = (self.what, self.where, self.fix)

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        return f"{text} {self.fix}".strip()


def listed(names: Sequence[str], most: int = 5, between: str = ", ") -> str:
    """The first few names, and how many more there are."""
    more = f"{between.lstrip(',')}and {len(names) - most} more" if len(names) > most else ""
    return f"{between.join(names[:most])}{more}"


def counted(number: int, what: str) -> str:
    """`1 unit`, `2 units`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def kind_of(text: str, name: str = "") -> str:
    """What a message shares with those of its kind: paths, numbers and lists are taken out, and the
    parts of the name (`dataset/case`, `teacher x dataset/case`) that it is of."""
    text = re.sub(r"\S*/\S*|\[[^]]*\]", "…", text)
    for part in re.split(r"/| x ", name):
        text = re.sub(rf"(?<!\w){re.escape(part)}(?!\w)", "…", text)
    return re.sub(r"\d+", "…", text)


def _writable(text: str) -> str:
    """Names of files that are not UTF-8 escaped: Python keeps their bytes as halves of surrogates,
    which no file and no terminal takes."""
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@contextmanager
def named(place: str) -> Iterator[None]:
    """Errors that leave the block name the place."""
    try:
        yield
    except PipelineError as error:
        error.at(place)
        raise


class Stopped(PipelineError):
    """A signal ended the work early; what was done is saved."""


class ConfigError(PipelineError):
    """A stage configuration or a command-line value that cannot be used."""

    exit_code = 2


class RegistryError(PipelineError):
    """A mistake in the data registry, or a file that it names and that is not usable."""

    exit_code = 2


class GeometryError(PipelineError):
    """An image or label whose shape, affine or values cannot be trusted."""

    exit_code = 2


class TeacherError(PipelineError):
    """A teacher that cannot be loaded, contradicts the registry, or emits unusable numbers."""

    exit_code = 2


class OutputsError(TeacherError):
    """Outputs of another kind than the registry says: no unit of this teacher can be right."""


class TeacherWarning(RuntimeWarning):
    """What is improbable of a teacher and stops nothing."""


class WorkFolderError(PipelineError):
    """A work folder that cannot be created or written."""

    exit_code = 2


class SpaceError(WorkFolderError):
    """What is to be written would fill the disk, or pass the quota."""


class EngineError(PipelineError):
    """The workers, or what directs them, are gone or cannot be started; what is done stays done."""


class WorkerDied(EngineError):
    """The processes that worked on a case died, each time that it was tried."""


class StoreUnreachable(PipelineError):
    """An object store does not answer. Nothing is known of the cache in it, so this is no
    `CacheError`: what is damaged may be made again or removed, what cannot be asked after may not.
    """


class CacheError(PipelineError):
    """The cache cannot give what was asked of it."""


class CacheMissing(CacheError):
    """A unit that does not exist: it has no receipt."""


class CacheIncomplete(CacheError):
    """A unit whose receipt names objects that are not there."""


class CacheStale(CacheError):
    """A unit, or an index entry, that was made for other settings."""


class CacheCorrupt(CacheError):
    """Bytes that are not the bytes the receipt vouches for."""


class CheckpointError(PipelineError):
    """A checkpoint that cannot be read, or that belongs to another run."""

    exit_code = 2
