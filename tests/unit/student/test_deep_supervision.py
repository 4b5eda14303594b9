from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.data.labels import IGNORE
from pipeline.errors import ConfigError
from pipeline.networks.by_name import NetworkConfig
from pipeline.student.network import StudentNetwork, output_weights, over_outputs, seeded_network
from pipeline.student.settings import SupervisionConfig, TrainingConfig
from pipeline.student.supervision import Batch, batch_loss
from tests.tiny import NETWORK
from tests.unit.student.test_networks_by_name import NAMES, NETWORKS, NUM_ORGANS

EDGE = 8


def settings(network: NetworkConfig, deep_supervision: bool | None) -> TrainingConfig:
    return TrainingConfig(
        network=network, patch=(EDGE, EDGE, EDGE), deep_supervision=deep_supervision
    )


def deep(*, deep_supervision: bool | None = None) -> StudentNetwork:
    """Outputs of 8^3 and 4^3."""
    name, args, edge, _ = NETWORKS[NAMES.index("SegResNetDS")]
    assert edge == EDGE
    network = seeded_network(
        settings(NetworkConfig(name=name, args=args), deep_supervision), NUM_ORGANS
    )
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
    return network.train()


def batch() -> Batch:
    random = torch.Generator().manual_seed(0)
    d = 3 * torch.randn(2, NUM_ORGANS, EDGE, EDGE, EDGE, generator=random)
    d[0, 0, :2] = torch.nan
    classes = torch.randint(0, NUM_ORGANS + 1, (2, EDGE, EDGE, EDGE), generator=random)
    classes[0][classes[0] == 2] = 0
    classes[1][classes[1] == 1] = 0
    classes[1, :, 3] = IGNORE
    return Batch(
        image=torch.randn(2, 1, EDGE, EDGE, EDGE, generator=random),
        classes=classes,
        annotated=torch.tensor([[True, False], [False, True]]),
        known=torch.ones(2, NUM_ORGANS, dtype=torch.bool),
        log_odds=d,
    )


def test_weights_halve_and_add_up_to_one() -> None:
    assert output_weights(1) == [1.0]
    assert output_weights(3) == pytest.approx([4 / 7, 2 / 7, 1 / 7])


def test_a_coarse_value_meets_the_targets_of_all_its_voxels() -> None:
    """What one cell learns is the mean over its voxels, the ignored left out."""
    coarse = torch.randn(1, 1, 2, 2, 2, requires_grad=True)
    fine = torch.zeros(1, 1, 4, 4, 4)
    target = torch.randn(1, 1, 4, 4, 4)
    counted = torch.ones_like(target)
    counted[0, 0, 0, 0, 0] = 0

    def term(logits: Tensor) -> dict[str, Tensor]:
        assert logits.shape == target.shape
        return {"square": (counted * (logits - target) ** 2).sum()}

    over_outputs((fine, coarse), term)["square"].backward()  # type: ignore[no-untyped-call]
    first = (counted * target)[0, 0, :2, :2, :2].sum()
    expected = 2 * (7 * coarse.detach()[0, 0, 0, 0, 0] - first) / 3
    assert coarse.grad is not None
    torch.testing.assert_close(coarse.grad[0, 0, 0, 0, 0], expected)


@pytest.mark.parametrize("kind", ["ms_kd", "marginal", "pseudo_label", "naive"])
def test_each_term_is_the_weighted_sum_of_what_each_output_alone_would_give(kind: str) -> None:
    config = SupervisionConfig.model_validate({"kind": kind})
    network = deep()
    outputs, _ = network(batch().image)
    assert isinstance(outputs, tuple)
    full = [outputs[0], outputs[1].repeat_interleave(2, 2).repeat_interleave(2, 3)]
    full[1] = full[1].repeat_interleave(2, 4)
    alone = [batch_loss(config, Fixed(logits), batch(), 0.25)[1] for logits in full]  # type: ignore[arg-type]
    loss, terms = batch_loss(config, network, batch(), 0.25)
    assert terms.keys() == alone[0].keys()
    for name, value in terms.items():
        assert value == pytest.approx(2 / 3 * alone[0][name] + 1 / 3 * alone[1][name], rel=1e-5)
    assert float(loss.detach()) == pytest.approx(sum(terms.values()), rel=1e-5)


def test_every_head_is_taught_or_with_false_the_final_one_alone() -> None:
    config = SupervisionConfig(kind="marginal")
    for setting, taught in ((None, True), (True, True), (False, False)):
        network = deep(deep_supervision=setting)
        batch_loss(config, network, batch(), 0.0)[0].backward()  # type: ignore[no-untyped-call]
        coarse = network.network.get_submodule("up_layers.0.head")
        assert (coarse.weight.grad is not None) is taught, setting


def test_a_network_without_it_is_trained_as_ever_and_refused_if_it_is_asked_for() -> None:
    def student(setting: bool | None) -> StudentNetwork:
        return seeded_network(settings(NETWORK, setting), NUM_ORGANS)

    assert isinstance(student(None).train()(batch().image)[0], Tensor)
    with pytest.raises(
        ConfigError, match=r"training\.deep_supervision: UNet .*one output.*dsdepth"
    ):
        student(True)


def test_it_validates_with_one_output() -> None:
    assert isinstance(deep().eval()(batch().image)[0], Tensor)


class Fixed:
    """A network that says the same whatever it sees."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def __call__(self, image: Tensor) -> tuple[Tensor, None]:
        return self._logits, None
