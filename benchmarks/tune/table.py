"""The tables of `python -m benchmarks.tune`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.tune.loss import TEMPERATURES
from benchmarks.tune.measure import Tuning
from pipeline.log import print_table


def print_tuning(found: Tuning) -> None:
    """The tables, for people; * marks the configured setting."""
    cases = ", ".join(f"{name} {'x'.join(map(str, s))}" for name, s in found.cases.items())
    rows = [
        [
            *_named(row),
            f"{row['bytes_per_voxel']:.3f}",
            *(f"{row['mean_kl'][str(t)]:.0e}" for t in TEMPERATURES),
            f"{row['largest_kl']:.0e}",
            str(row["argmax_flips"]),
            str(row["region_flips"]),
            *_speeds(row),
        ]
        for row in found.log_odds
    ]
    columns = ["stored as", "chunk", "zstd", "B/voxel", "KL at T=1", "T=2", "T=4"]
    columns += ["largest", "argmax flips", "region flips", "enc", "dec"]
    seen = f"{100 * found.log_odds[0]['seen']:.0f} % of voxels seen"
    print_table(f"Log-odds, per organ and teacher; {cases}; {seen}", columns, rows)
    rows = [
        [
            *_named(row),
            f"{row['bytes_per_value']:.3f}",
            f"{row['bytes_per_voxel']:.3f}",
            f"{100 * row['rms_error']:.2f} %",
            f"{100 * row['largest_error']:.1f} %",
            f"{row['mean_cosine_distance']:.0e}",
            *_speeds(row),
        ]
        for row in found.features
    ]
    columns = ["stored as", "chunk", "zstd", "B/value", "B/voxel", "RMS error"]
    if rows:
        print_table("Features, per tap", [*columns, "largest", "1 - cos", "enc", "dec"], rows)
    print("enc, dec: millions of values encoded and decoded per CPU second")


def _named(row: Mapping[str, Any]) -> list[str]:
    mark = " *" if row["configured"] else ""
    return [f"{row['stored_as']}{mark}", str(row["chunk"]), str(row["zstd_level"])]


def _speeds(row: Mapping[str, Any]) -> list[str]:
    return [f"{row[key]:.0f}" for key in ("encode_mvalues_per_cpu_s", "decode_mvalues_per_cpu_s")]
