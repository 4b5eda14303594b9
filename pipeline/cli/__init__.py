"""The command line: what can be typed. Commands parse, call and print; each imports what it
runs inside its function, so that `--help` loads no torch."""

from pipeline.cli.app import main

__all__ = ["main"]
