from __future__ import annotations

import pickle

import pytest

from pipeline.errors import CacheCorrupt, ConfigError, PipelineError


@pytest.mark.parametrize(
    "error",
    [
        PipelineError("it broke."),
        ConfigError("unknown key.", where="a.yaml:3", fix="Remove it."),
        CacheCorrupt("other bytes.", where="unit.zarr"),
    ],
)
def test_an_error_of_a_worker_process_arrives_whole(error: PipelineError) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert (arrived.what, arrived.where, arrived.fix) == (error.what, error.where, error.fix)
