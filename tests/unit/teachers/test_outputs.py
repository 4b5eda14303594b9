"""Probabilities, one-hot outputs and maps of labels are not taken for logits."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.data.entries import TeacherEntry
from pipeline.data.labels import log_odds
from pipeline.data.patches import WindowConfig
from pipeline.errors import OutputsError, TeacherWarning
from pipeline.networks.windows import SlidingWindow
from pipeline.teachers.outputs import OutputsOfCase, to_logits
from tests.tiny import teacher_data

WHERE = "mine x a/case"


def entry(**changes: Any) -> TeacherEntry:
    return TeacherEntry.model_validate(teacher_data("liver", **changes))


def logits(channels: int = 2, *, seed: int = 0, spread: float = 6.0) -> Tensor:
    """(1, C, 12, 10, 8): smooth, an organ in the middle, background nearly everywhere else."""
    generator = torch.Generator().manual_seed(seed)
    z, y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (12, 10, 8)), indexing="ij")
    inside = 1 - 2 * (z**2 + y**2 + x**2)
    own = torch.stack([(-inside if c == 0 else inside / c) for c in range(channels)])
    return (spread * own + 0.1 * torch.rand(own.shape, generator=generator))[None]


def judge(outputs: Tensor, **changes: Any) -> None:
    """As stage one does: slab by slab."""
    of_case = OutputsOfCase(entry(**changes), where=WHERE)
    for rows in np.array_split(outputs[0].float().numpy(), 4, axis=1):
        of_case.put(rows)
    of_case.judge()


def refused(outputs: Tensor, **changes: Any) -> str:
    with pytest.raises(OutputsError) as caught:
        judge(outputs, **changes)
    assert caught.value.where == WHERE
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [2, 3, 40])
def test_softmax_outputs_are_refused_in_any_precision(dtype: torch.dtype, channels: int) -> None:
    message = refused(torch.softmax(logits(channels), 1).to(dtype))
    assert "are probabilities, not logits: all lie in [0, 1], and its channels sum to 1" in message
    assert "End the network before its softmax, or enter `outputs: probabilities`" in message


def test_softmax_outputs_are_refused_in_a_case_without_the_organ() -> None:
    nothing = logits() + torch.tensor([8.0, -8.0]).view(1, 2, 1, 1, 1)
    refused(torch.softmax(nothing, 1))
    refused(torch.softmax(nothing * 9, 1).half())  # 0 and 1 throughout


@pytest.mark.parametrize("organ", [True, False])
@pytest.mark.parametrize("channels", [1, 2])
def test_sigmoid_outputs_are_refused(channels: int, organ: bool) -> None:
    outputs = torch.sigmoid(logits(channels) - (0 if organ else 20))
    message = refused(outputs, activation="sigmoid", organs={"liver": 0})
    assert "all lie in [0, 1], and fill it as only probabilities do" in message
    assert "before its sigmoid" in message


def test_sigmoid_outputs_under_a_wrong_activation_are_refused() -> None:
    refused(torch.sigmoid(logits()))
    undecided = torch.sigmoid(logits())
    undecided[:, 0] = 0.5  # and half of the organ's channel, where its network gives 0 for air
    undecided[:, 1, :, :5] = 0.5
    assert "fill it as only probabilities do" in refused(undecided)


def test_one_hot_outputs_are_refused_and_a_map_of_labels_by_its_own_name() -> None:
    best = logits(4).argmax(1, keepdim=True)
    refused(torch.zeros(1, 4, 12, 10, 8).scatter_(1, best, 1.0))
    for outputs in (best, best.clamp(max=1)):
        message = refused(outputs, activation="sigmoid", organs={"liver": 0})
        assert "a map of labels, not logits" in message
        assert "before" not in message


@pytest.mark.parametrize(
    "outputs",
    [
        logits(),
        logits(spread=0.4),
        logits(spread=0.4) + 0.3,  # in [-.., 1.1]
        torch.log_softmax(logits(), 1),
        torch.relu(logits()),  # above 1 somewhere
    ],
    ids=["logits", "weak", "shifted", "log-softmax", "relu"],
)
def test_logits_pass(outputs: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge(outputs)


def test_windows_of_air_that_happen_to_lie_between_0_and_1_settle_nothing() -> None:
    """A network that gives 0 for air, and what it is sure of elsewhere: its first rows are air."""
    outputs = torch.zeros(1, 1, 12, 10, 8)
    outputs[:, :, 3, 4:6] = 0.8
    with pytest.raises(OutputsError):
        judge(outputs, activation="sigmoid", organs={"liver": 0})
    outputs[:, :, 9, 4:6] = 7.5
    outputs[:, :, 10] = -3.0
    judge(outputs, activation="sigmoid", organs={"liver": 0})


@pytest.mark.parametrize("value", [0.0, 0.3, 0.5, 4.0, -2.0])
def test_a_network_that_says_the_same_everywhere_is_left_to_the_gate(value: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge(torch.full((1, 2, 12, 10, 8), value))


def test_what_may_be_either_is_said() -> None:
    outputs = 0.2 + 0.5 * torch.rand(1, 2, 12, 10, 8, generator=torch.Generator().manual_seed(0))
    with pytest.warns(TeacherWarning, match=r"mine x a/case: all outputs lie in \[0, 1\]"):
        judge(outputs)


def test_blending_hides_nothing() -> None:
    """Means of windows that disagree, as half precision rounds them: what is looked at in fact."""

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            odds = (x - x.mean()) * 9  # depends on the window
            return torch.softmax(torch.cat([-odds, odds], 1), 1).half()

    image = np.random.default_rng(0).normal(size=(20, 18, 17)).astype(np.float32)
    outputs, _ = SlidingWindow(Net(), WindowConfig(shape=(8, 8, 8), overlap=0.5)).run(image)
    assert "sum to 1" in refused(torch.from_numpy(outputs)[None])


# --- `outputs: probabilities` -------------------------------------------------------------------


def odds_of(
    outputs: Tensor, activation: str, dtype: torch.dtype, organ: tuple[int, ...] = (1,)
) -> npt.NDArray[np.float32]:
    said = entry(outputs="probabilities", activation=activation)
    found = to_logits(outputs.to(dtype), said, where=WHERE)
    assert found.dtype == torch.float32
    return log_odds(found[0].numpy(), organ, said.activation)


@pytest.mark.parametrize("organ", [(1,), (1, 2)])
def test_log_odds_of_a_softmax_are_those_of_its_logits(organ: tuple[int, ...]) -> None:
    raw = logits(3, spread=1.5)
    expected = log_odds(raw[0].numpy(), organ, "softmax")
    found = odds_of(torch.softmax(raw, 1), "softmax", torch.float32, organ)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    rough = odds_of(torch.softmax(raw, 1), "softmax", torch.float16, organ)
    np.testing.assert_allclose(rough, expected, rtol=0.01, atol=0.15)


def test_log_odds_of_a_sigmoid_are_its_logits() -> None:
    raw = logits(2, spread=3.0).clamp(-12, 10)
    found = odds_of(torch.sigmoid(raw), "sigmoid", torch.float32)
    np.testing.assert_allclose(found, raw[0, 1].numpy(), atol=5e-3)


@pytest.mark.parametrize(
    ("activation", "dtype", "low", "high"),
    [
        ("softmax", torch.float32, -16.6, 16.6),
        ("softmax", torch.float16, -16.6, 16.6),
        ("sigmoid", torch.float32, -16.6, 16.6),
        ("sigmoid", torch.float16, -16.6, 7.6),
        ("sigmoid", torch.bfloat16, -16.6, 5.5),
    ],
)
def test_they_are_bounded_by_what_the_precision_can_tell(
    activation: str, dtype: torch.dtype, low: float, high: float
) -> None:
    raw = torch.tensor([-200.0, 0.1, 200.0]).view(1, 1, 3, 1, 1)
    p = torch.sigmoid(raw)
    outputs = torch.cat([1 - p, p], 1)
    found = odds_of(outputs, activation, dtype).ravel()
    np.testing.assert_allclose(found, [low, 0.1, high], atol=0.06)


def no_probabilities(outputs: Tensor, **changes: Any) -> str:
    with pytest.raises(OutputsError) as caught:
        to_logits(outputs, entry(outputs="probabilities", **changes), where="teacher mine")
    assert caught.value.where == "teacher mine"
    return str(caught.value)


def test_what_is_no_probability_is_refused() -> None:
    message = no_probabilities(logits())
    assert "its outputs reach from -" in message
    assert "these are logits" in message
    assert "sum to 1" in no_probabilities(torch.sigmoid(logits()))
    assert "activation: sigmoid" in no_probabilities(torch.sigmoid(logits()))
    one_hot = (logits() > 0).float()
    for activation in ("softmax", "sigmoid"):
        said = no_probabilities(one_hot if activation == "sigmoid" else torch.cat(
            [one_hot[:, :1], 1 - one_hot[:, :1]], 1), activation=activation)  # fmt: skip
        assert "its outputs are one-hot: 0 and 1, and nothing between" in said
        assert "no log-odds" in said


def test_certainty_alone_is_not_one_hot() -> None:
    sure = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1, 1).expand(1, 2, 4, 4, 4)
    found = to_logits(sure, entry(outputs="probabilities"), where=WHERE)
    assert math.isclose(float(found[0, 1].max()), -24 * math.log(2), rel_tol=1e-6)


def test_nan_stays_for_whoever_names_it() -> None:
    outputs = torch.softmax(logits(), 1)
    outputs[0, :, 3, 3, 3] = math.nan
    found = to_logits(outputs, entry(outputs="probabilities"), where=WHERE)
    assert int(found.isnan().sum()) == 2


def test_the_field_enters_a_key_only_where_it_is_set() -> None:
    assert "outputs" not in entry().key()
    assert entry(outputs="logits").key() == entry().key()
    assert entry(outputs="probabilities").key()["outputs"] == "probabilities"


def test_nnunet_gives_logits() -> None:
    values = {"kind": "nnunet", "weights": "m", "organs": {"liver": 1}, "outputs": "probabilities"}
    with pytest.raises(ValidationError, match="kind `nnunet` gives logits: leave it out"):
        TeacherEntry.model_validate(values)
