"""`python -m tests.website.warm_pipeline SOCKET CALLS`: the program `pipeline`, imported once.

Importing torch and its kin takes most of the time of a short command. Here it is done once; each
call is a fork of this process, which has no thread yet, and ends as a process of its own: `main`,
its own folder, environment, standard streams and exit code. CALLS gets one JSON line per call.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

from pipeline.cli.record import exit_code_of

# What the commands import beside the project's own modules, inside functions.
_THIRD = ("monai.networks.nets", "matplotlib.figure", "nnunetv2.inference.predict_from_raw_data")

# What `pipeline` is in the shell: it hands its arguments, place and streams over.
CLIENT = """#!{python} -IS
import json, os, socket, sys
call = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"!"], [0, 1, 2])
    server.sendall(json.dumps(call).encode())
    server.shutdown(socket.SHUT_WR)
    answer = server.makefile().read()
sys.exit(int(answer) % 256)
"""


def serve(address: str, calls: Path) -> None:
    """Answers calls. It returns only in a child, which is to run the command of `sys.argv`."""
    warm()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        while True:
            connection, _ = server.accept()
            with connection:
                _, streams, _, _ = socket.recv_fds(connection, 1, 3)
                call = json.loads(connection.makefile("rb").read())
                began = time.monotonic()
                assert threading.active_count() == 1, threading.enumerate()
                child = os.fork()
                if child == 0:
                    server.close()
                    become(call, streams)
                    return
                for stream in streams:
                    os.close(stream)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                seconds = round(time.monotonic() - began, 2)
                line = {"arguments": call["arguments"], "code": code, "seconds": seconds}
                with calls.open("a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
                connection.sendall(str(code).encode())


def warm() -> None:
    """Imports all that a command may want."""
    import pipeline
    import stages

    for package in (pipeline, stages):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    for name in _THIRD:
        importlib.import_module(name)


def become(call: dict[str, object], streams: list[int]) -> None:
    """Makes this process the one that was called."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(str(call["folder"]))
    os.environ.clear()
    os.environ.update(call["environment"])  # type: ignore[call-overload]
    sys.argv = ["pipeline", *call["arguments"]]  # type: ignore[misc]
    sys.modules["__main__"].__package__ = None  # or usage is told of `python -m tests...`


def end(code: int) -> NoReturn:
    """As an interpreter ends, except that it does not take all those modules apart: that is 3 s."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
    from pipeline.cli.app import main

    try:
        main()
    except SystemExit as ended:
        end(exit_code_of(ended))
    except BaseException:
        traceback.print_exc()
        end(1)
    end(0)
