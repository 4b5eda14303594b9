"""A real S3 server for tests: moto in a process of its own, on loopback, with one bucket.

Run as a module it prints its port and lives until its standard input closes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upath import UPath

ROOT = Path(__file__).resolve().parents[1]
BUCKET = "organ-distill"


@contextmanager
def object_store() -> Iterator[str]:
    """Starts the server; within the block the AWS_* variables lead to it.

    Yields:
        Its endpoint.
    """
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.object_store"], cwd=ROOT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
    said = environment(endpoint)
    before = {name: os.environ.get(name) for name in said}
    os.environ.update(said)
    try:
        folder(BUCKET).fs.mkdir(BUCKET)
        yield endpoint
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        server.stdin.close()
        server.wait(timeout=30)


def environment(endpoint: str) -> dict[str, str]:
    """What leads a client to the server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def folder(path: str) -> UPath:
    """A folder of the server: `bucket/prefix`."""
    from pipeline.folder import is_local, parse_folder

    found = parse_folder(f"s3://{path}")
    assert not is_local(found)
    return found


def main() -> None:
    """Serves until standard input closes."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    sys.stdout.write(f"{server.get_host_and_port()[1]}\n")
    sys.stdout.flush()
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()
