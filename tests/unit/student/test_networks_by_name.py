"""Segmentation networks of MONAI and nnU-Net, each as a student: built, trained, saved, used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.labels import Intensity
from pipeline.errors import ConfigError
from pipeline.networks.by_name import NetworkConfig, build_network, output_shapes, tap_shapes
from pipeline.student.checkpoint import StudentRecord, load_student, save_student
from pipeline.student.inference import StudentWindows
from pipeline.student.network import StudentNetwork, seeded_network
from pipeline.student.settings import TrainingConfig, build_optimiser
from pipeline.student.supervision import Batch
from pipeline.student.training import make_step
from tests.unit.student.samples import state_of

# As nnU-Net's plans have them, without the classes of layers.
NNUNET: dict[str, Any] = {
    "n_stages": 3,
    "features_per_stage": [4, 4, 8],
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_conv_per_stage_decoder": [1, 1],
    "conv_bias": True,
}
# Name, arguments, patch edge, number of outputs while training.
NETWORKS: list[tuple[str, dict[str, Any], int, int]] = [
    ("UNet", {"channels": [4, 8], "strides": [2]}, 8, 1),
    ("AttentionUnet", {"channels": [4, 8], "strides": [2]}, 8, 1),
    (
        "DynUNet",
        {
            "kernel_size": [3, 3, 3, 3],
            "strides": [1, 2, 2, 2],
            "upsample_kernel_size": [2, 2, 2],
            "filters": [4, 4, 4, 8],
            "deep_supervision": True,
            "deep_supr_num": 2,
        },
        16,
        3,
    ),
    ("SegResNet", {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}, 8, 1),
    ("SegResNetDS", {"init_filters": 8, "blocks_down": [1, 1, 1], "dsdepth": 2}, 8, 2),
    ("BasicUNet", {"features": [2, 2, 2, 2, 2, 2]}, 32, 1),
    ("BasicUNetPlusPlus", {"features": [2, 2, 2, 2, 2, 2], "deep_supervision": True}, 32, 4),
    (
        "MedNeXt",
        {
            "init_filters": 4,
            "blocks_down": [1, 1],
            "blocks_bottleneck": 1,
            "blocks_up": [1, 1],
            "deep_supervision": True,
        },
        16,
        3,
    ),
    (
        "UNETR",
        {
            "img_size": [16, 16, 16],
            "feature_size": 2,
            "hidden_size": 12,
            "mlp_dim": 12,
            "num_heads": 2,
        },
        16,
        1,
    ),
    (
        "PlainConvUNet",
        {**NNUNET, "n_conv_per_stage": 1, "deep_supervision": True},
        16,
        2,
    ),
    (
        "ResidualEncoderUNet",
        {**NNUNET, "n_blocks_per_stage": [1, 1, 2], "deep_supervision": True},
        16,
        2,
    ),
]
NAMES = [row[0] for row in NETWORKS]
NUM_ORGANS = 2


def settings(name: str, args: dict[str, Any], edge: int) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "network": {"name": name, "args": args},
            "patch": [edge] * 3,
            "steps": 10,
            "supervision": {"kind": "marginal"},
        }
    )


def student(config: TrainingConfig) -> StudentNetwork:
    return seeded_network(config, NUM_ORGANS)


def batch_of(edge: int) -> Batch:
    random = torch.Generator().manual_seed(0)
    return Batch(
        image=torch.randn(1, 1, edge, edge, edge, generator=random),
        classes=torch.randint(0, NUM_ORGANS + 1, (1, edge, edge, edge), generator=random),
        annotated=torch.ones(1, NUM_ORGANS, dtype=torch.bool),
        known=torch.ones(1, NUM_ORGANS, dtype=torch.bool),
    )


@pytest.mark.parametrize(("name", "args", "edge", "num_outputs"), NETWORKS, ids=NAMES)
def test_it_trains_a_step_is_saved_and_predicts(
    name: str, args: dict[str, Any], edge: int, num_outputs: int, tmp_path: Path
) -> None:
    config = settings(name, args, edge)
    network = student(config).train()
    outputs, _ = network(batch_of(edge).image)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert len(outputs) == num_outputs
    assert outputs[0].shape == (1, NUM_ORGANS + 1, edge, edge, edge)

    before = {n: w.clone() for n, w in network.named_parameters()}
    optimiser = build_optimiser(config.optimiser, network)
    make_step(state_of(config, network, optimiser), batch_of(edge), 0)
    taught = {n: w for n, w in network.named_parameters() if w.grad is not None}
    if name == "ResidualEncoderUNet":  # its blocks begin as identities, so not all of it is reached
        taught = {n: w for n, w in taught.items() if w.grad.any()}  # type: ignore[union-attr]
    still = [n for n, w in taught.items() if w.equal(before[n])]
    assert not still

    record = StudentRecord.model_validate(
        {
            "network": config.network.model_dump(), "organs": {"liver": 1, "spleen": 2},
            "spacing_mm": (3, 3, 3), "intensity": Intensity().model_dump(), "patch": config.patch,
            "steps": 1, "seed": 0, "supervision": {}, "validation_dice": {}, "teachers": {},
            "trained_on": (), "run_digest": "",
        }
    )  # fmt: skip
    save_student(tmp_path / "student.pt", record, network.network)
    _, loaded = load_student(tmp_path / "student.pt")
    hu = np.random.default_rng(0).integers(-200, 300, (edge, edge, edge + 4)).astype(np.int16)
    both = [
        StudentWindows(n, Intensity(), config.patch).logits(hu)
        for n in (network.network.eval(), loaded)
    ]
    assert both[0].shape == (NUM_ORGANS + 1, *hu.shape)
    assert np.array_equal(*both)


@pytest.mark.parametrize(
    "name",
    ["SegResNetDS", "DynUNet", "MedNeXt", "BasicUNetPlusPlus", "PlainConvUNet",
     "ResidualEncoderUNet"],
)  # fmt: skip
def test_the_first_output_while_training_is_the_one_that_predicts(name: str) -> None:
    """Those that return several do not agree on where the final one stands."""
    _, args, edge, _ = NETWORKS[NAMES.index(name)]
    network = build_network(NetworkConfig(name=name, args=args), in_channels=1, out_channels=3)
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0  # after one pass its statistics are those of that pass
    image = batch_of(edge).image
    while_training = network.train()(image)[0]
    predicted = network.eval()(image)
    final = {"BasicUNetPlusPlus": "final_conv_0_4", "SegResNetDS": "up_layers.1.head"}.get(name)
    if final is None:
        torch.testing.assert_close(while_training, predicted, rtol=1e-3, atol=1e-4)
        return
    seen: list[Tensor] = []
    layer = network.get_submodule(final)
    layer.register_forward_hook(lambda module, inputs, out: seen.append(out))
    assert torch.equal(network(image), seen[0])
    assert torch.equal(network.train()(image)[0], seen[1])


def test_a_network_of_nnunet_begins_as_nnunet_builds_it() -> None:
    """Weights of its own initialisation, under the names that its checkpoints have."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    _, args, _, _ = NETWORKS[NAMES.index("PlainConvUNet")]
    torch.manual_seed(0)
    config = NetworkConfig(name="PlainConvUNet", args=args)
    ours = build_network(config, in_channels=1, out_channels=3)
    layers = {
        "conv_op": "torch.nn.Conv3d", "norm_op": "torch.nn.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    torch.manual_seed(0)
    theirs = get_network_from_plans(
        "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        {**args, **layers},
        ("conv_op", "norm_op", "nonlin"),
        1,
        3,
    )
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("name", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_stages_of_nnunets_networks_can_be_tapped(name: str) -> None:
    _, args, edge, _ = NETWORKS[NAMES.index(name)]
    network = build_network(NetworkConfig(name=name, args=args), in_channels=1, out_channels=3)
    shapes = tap_shapes(network, ["encoder.stages.2", "decoder.stages.0"], (edge,) * 3)
    assert shapes == {"encoder.stages.2": (8, (2, 4, 4)), "decoder.stages.0": (4, (1, 2, 2))}


def test_nnunets_library_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dynamic_network_architectures.architectures", None)
    _, args, edge, _ = NETWORKS[NAMES.index("PlainConvUNet")]
    with pytest.raises(
        ConfigError, match=r"network\.name: PlainConvUNet .* not installed.*DynUNet"
    ):
        student(settings("PlainConvUNet", args, edge))


def test_what_one_pass_needs_to_know_costs_neither_numbers_nor_randomness() -> None:
    _, args, edge, _ = NETWORKS[NAMES.index("SegResNetDS")]
    config = NetworkConfig(name="SegResNetDS", args=args)
    network = build_network(config, in_channels=1, out_channels=3).eval()
    before = {n: w.clone() for n, w in network.state_dict().items()}
    random = torch.get_rng_state()
    assert output_shapes(network, (edge,) * 3) == [(3, 8, 8, 8), (3, 4, 4, 4)]
    assert all(torch.equal(w, before[n]) for n, w in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not network.training


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("SegResNetVAE", {"input_image_size": [16, 16, 16]}, r"gives outputs of shape .*, \(\)"),
        ("DynUNet", {"kernel_size": [3, 3, 3], "strides": [2, 2, 2],
                     "upsample_kernel_size": [2, 2], "filters": [4, 4, 8]},
         r"\(3, 8, 8, 8\).* where logits of \(3, 16, 16, 16\)"),
        ("DAF3D", {}, "has no spatial_dims"),
        ("PlainConvUNet", {**NNUNET, "n_conv_per_stage": 1, "conv_op": "torch.nn.Conv3d"},
         r"multiple values .* given already: .*conv_op"),
        ("PlainConvUNet", {**NNUNET, "n_conv_per_stage": [1, 1]}, "n_conv_per_stage must have"),
        ("UNet", {"channels": [2, 2, 2, 2, 2], "strides": [2, 2, 2, 2], "norm": "instance"},
         "cannot take a patch"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_student_is_refused_when_it_is_built(
    name: str, args: dict[str, Any], says: str
) -> None:
    """The last one's deepest layer has a single cell: its norm fails, and only while training."""
    with pytest.raises(ConfigError, match=says):
        student(settings(name, args, 16))
