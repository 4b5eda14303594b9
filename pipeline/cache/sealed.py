"""JSON files that vouch for themselves: a number with one other digit would be believed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.cache.store import json_text, write_json
from pipeline.config import digest
from pipeline.folder import Folder, is_local, read_text, unreachable


def write_sealed(path: Folder, content: Mapping[str, Any]) -> None:
    """Writes content and, as the last field, the digest of all others; see `write_json`.

    Raises:
        WorkFolderError: it cannot be written.
    """
    write_json(path, {**content, "seal": digest(content)})


def read_sealed(path: Folder) -> dict[str, Any]:
    """The content, without the seal.

    Raises:
        OSError: it cannot be read.
        ValueError, KeyError: it is not, byte by byte, what was written.
        StoreUnreachable: an object store does not answer.
    """
    try:
        text = read_text(path)
    except OSError as error:
        if not is_local(path) and not isinstance(error, FileNotFoundError):
            raise unreachable(path, error) from error
        raise
    content: dict[str, Any] = json.loads(text)
    seal = content.pop("seal")
    if seal != digest(content) or text != json_text({**content, "seal": seal}):
        raise ValueError("it has other bytes than were written")
    return content
