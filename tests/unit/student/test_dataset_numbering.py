from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.cache.reader import CachedCase
from pipeline.student.augment import AugmentConfig
from pipeline.student.distributed import Processes
from tests.tiny import run_python
from tests.unit.student.coded import TAP
from tests.unit.student.samples import CACHED, MOVING, dataset, fingerprint, fingerprints


class TestPureFunctionOfItsNumber:
    def test_order_and_repetition_do_not_matter(self, coded_cases: list[CachedCase]) -> None:
        data = dataset(coded_cases, augment=MOVING)
        forwards = fingerprints(data)
        order = np.random.default_rng(0).permutation(len(data))
        again = {int(item): fingerprint(data[int(item)]) for item in order}
        assert [again[item] for item in range(len(data))] == forwards
        assert len(set(forwards)) == len(forwards)

    @pytest.mark.parametrize("pool_bytes", [0, 20_000])
    def test_the_pool_does_not_matter(self, coded_cases: list[CachedCase], pool_bytes: int) -> None:
        settings = {"taps": {TAP: CACHED}, "augment": AugmentConfig()}
        roomy = fingerprints(dataset(coded_cases, **settings))
        assert fingerprints(dataset(coded_cases, pool_bytes=pool_bytes, **settings)) == roomy

    def test_global_random_state_does_not_matter_and_is_left_alone(
        self, coded_cases: list[CachedCase]
    ) -> None:
        data = dataset(coded_cases, augment=AugmentConfig(flip_axes=(2,), intensity=1))
        torch.manual_seed(0)
        first = fingerprint(data[1])
        torch.manual_seed(1)
        before = torch.get_rng_state()
        assert fingerprint(data[1]) == first
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_seed_matters(self, coded_cases: list[CachedCase]) -> None:
        other = fingerprints(dataset(coded_cases, seed=4, augment=MOVING))
        assert set(fingerprints(dataset(coded_cases, augment=MOVING))).isdisjoint(other)

    def test_the_length_of_training_does_not_matter(self, coded_cases: list[CachedCase]) -> None:
        longer = dataset(coded_cases, steps=500)
        short = dataset(coded_cases)
        assert [fingerprint(longer[item]) for item in range(len(short))] == fingerprints(short)

    def test_step_and_index_are_what_counts_not_the_item(
        self, coded_cases: list[CachedCase]
    ) -> None:
        # Item 4 is (step 2, index 0) of batches of two and (step 4, index 0) of single samples.
        single = dataset(coded_cases, batch_size=1)
        pairs = dataset(coded_cases)
        assert fingerprint(single[2]) == fingerprint(pairs[4])
        assert fingerprint(single[4]) != fingerprint(pairs[4])

    def test_another_process_gives_the_same(
        self, coded_cases: list[CachedCase], coded_folder: Path
    ) -> None:
        data = dataset(coded_cases, taps={TAP: CACHED}, augment=AugmentConfig())
        torch.save(data, coded_folder / "data.pt")
        code = (
            "import sys, torch\n"
            "from tests.unit.student.samples import fingerprints\n"
            "print(*fingerprints(torch.load(sys.argv[1], weights_only=False)))\n"
        )
        done = run_python("-c", code, coded_folder / "data.pt")
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == fingerprints(data)


class TestProcesses:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 6])
    def test_all_processes_together_make_the_batches_of_one(
        self, coded_cases: list[CachedCase], world_size: int
    ) -> None:
        settings = {"batch_size": 6, "steps": 3, "augment": MOVING}
        whole = fingerprints(dataset(coded_cases, **settings))
        shares = [
            fingerprints(dataset(coded_cases, processes=Processes(rank, world_size), **settings))
            for rank in range(world_size)
        ]
        size = 6 // world_size
        together = [
            sample
            for step in range(3)
            for share in shares
            for sample in share[step * size : (step + 1) * size]
        ]
        assert together == whole
        assert {len(share) for share in shares} == {3 * size}
