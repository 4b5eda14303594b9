"""A case that does not fit: many channels of a large volume, in a process that is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# 48 channels of 320 x 64 x 64 voxels are 252 MB in float32; a window's depth of them 13 MB.
_CHILD = """
import json, resource
import numpy as np, torch
from pipeline.data.patches import WindowConfig
from pipeline.networks.windows import SlidingWindow

class Many(torch.nn.Module):
    def forward(self, x):
        return x.expand(-1, 48, -1, -1, -1)

def run(rows):
    seen = []
    config = WindowConfig(shape=(16, 32, 32), overlap=0)
    windows = SlidingWindow(Many(), config, scale=lambda hu: hu.astype(np.float32))
    image = np.zeros((rows, 64, 64), np.int16)
    windows.stream(image, lambda slab: seen.append(slab.shape[1]), {})
    assert sum(seen) == rows

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.set_num_threads(1)
run(32)
before = peak()
run(320)
print(json.dumps(peak() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_ten_times_the_case_takes_no_more_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    grown_mb = json.loads(done.stdout)
    assert grown_mb < 30  # the int16 volume itself is 3 MB
