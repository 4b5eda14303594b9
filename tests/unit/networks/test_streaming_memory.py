"""A case that does not fit: many channels of a large volume, in a process that is measured."""

from __future__ import annotations

import json
import sys

import pytest

from tests.tiny import run_python

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
    done = run_python("-c", _CHILD, timeout=300)
    assert done.returncode == 0, done.stderr
    grown_mb = json.loads(done.stdout)
    assert grown_mb < 30  # the int16 volume itself is 3 MB
