"""Networks of MONAI and nnU-Net by name, and taps: the outputs of named layers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.config import Config
from pipeline.errors import ConfigError

if TYPE_CHECKING:  # a second and more: what only reads settings does without
    import torch
    from torch import Tensor, nn

_DEFAULT_ARGS: Mapping[str, Any] = {
    "channels": [16, 32, 64, 96],
    "strides": [2, 2, 2],
    "num_res_units": 0,
    "norm": "instance",
}
# Of dynamic_network_architectures, nnU-Net's own library: an optional extra.
NNUNET_NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet")


class NetworkConfig(Config):
    """A network by name and its arguments; channels in and out are ours to give."""

    name: str = Field(
        default="UNet",
        description="class name in monai.networks.nets, or nnU-Net's PlainConvUNet or "
        "ResidualEncoderUNet",
    )
    args: dict[str, Any] = Field(
        default_factory=lambda: dict(_DEFAULT_ARGS),
        description="its arguments, except dimensions and channels in and out",
    )


def build_network(config: NetworkConfig, *, in_channels: int, out_channels: int) -> nn.Module:
    """Builds the network; weights come from torch's global random state.

    Networks with deep supervision differ in what they return: stacked along a new axis (DynUNet), a
    list (SegResNetDS, nnU-Net's), a tuple (MedNeXt), a list with the final output last
    (BasicUNetPlusPlus). What is built here gives one tensor in evaluation mode, (N, C, D, H, W),
    and while training either that or a tuple of such tensors, the final output first.

    Raises:
        ConfigError: no such network, arguments that it does not take, or nnU-Net's library is not
            installed.
    """
    of_nnunet = config.name in NNUNET_NETWORKS
    kind = _nnunet_class(config.name) if of_nnunet else _monai_class(config.name)
    ours: dict[str, Any] = {
        "spatial_dims": 3, "in_channels": in_channels, "out_channels": out_channels
    }  # fmt: skip
    if of_nnunet:
        ours = {"input_channels": in_channels, "num_classes": out_channels, **_nnunet_layers()}
    try:
        network: nn.Module = kind(**ours, **config.args)
    except (TypeError, ValueError, KeyError, AssertionError, IndexError) as error:
        raise ConfigError(
            f"{config.name} does not accept these arguments ({error}).",
            where="network.args",
            fix=f"It takes {inspect.signature(kind)}; given already: {', '.join(ours)}.",
        ) from error
    if of_nnunet:
        network.apply(kind.initialize)  # as nnU-Net does when it builds one from its plans
    network.register_forward_hook(_final_first)
    return network


def _monai_class(name: str) -> Any:
    from monai.networks import nets
    from torch import nn

    kind = getattr(nets, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
        raise ConfigError(
            f"monai.networks.nets has no network {name!r}.",
            where="network.name",
            fix="For example UNet, DynUNet, SegResNet, BasicUNet; nnU-Net's own are "
            f"{' and '.join(NNUNET_NETWORKS)}.",
        )
    if not {"spatial_dims", "in_channels", "out_channels"} <= set(
        inspect.signature(kind).parameters
    ):
        raise ConfigError(
            f"{name} has no spatial_dims, in_channels and out_channels to set.",
            where="network.name",
            fix="Choose a segmentation network, for example UNet, DynUNet, SegResNet, BasicUNet.",
        )
    return kind


def _nnunet_class(name: str) -> Any:
    try:
        from dynamic_network_architectures.architectures import unet
    except ImportError as error:
        raise ConfigError(
            f"{name} is of nnU-Net's library dynamic_network_architectures, which is not "
            f"installed ({error}).",
            where="network.name",
            fix="pip install 'organ-distill[networks]', or take MONAI's DynUNet.",
        ) from error
    return getattr(unet, name)


def _nnunet_layers() -> dict[str, Any]:
    """What nnU-Net's planner writes into all plans of volumes: classes, which YAML cannot name."""
    from torch import nn

    return {
        "conv_op": nn.Conv3d,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }


def _final_first(network: nn.Module, inputs: Any, out: Any) -> Any:
    """A forward hook, so that names of layers and weights stay those of their library."""
    from torch import Tensor

    if isinstance(out, Tensor):
        stacked = out.dim() == 6  # (N, heads, C, D, H, W)
        outputs: tuple[Any, ...] = out.unbind(1) if stacked else (out,)
    else:
        outputs = tuple(o for o in out if o is not None)
        if type(network).__name__ == "BasicUNetPlusPlus":
            outputs = outputs[::-1]
    return outputs if network.training and len(outputs) > 1 else outputs[0]


def find_module(network: nn.Module, name: str) -> nn.Module:
    """The layer of that name, as `named_modules()` spells it.

    Raises:
        ConfigError: no such layer; the message lists what exists.
    """
    modules = dict(network.named_modules())
    if name not in modules or not name:
        some = ", ".join([m for m in modules if m][:40])
        raise ConfigError(
            f"the network has no layer {name!r} to tap.",
            where=type(network).__name__,
            fix=f"It has: {some}.",
        )
    module: nn.Module = modules[name]
    return module


@contextmanager
def tapped(network: nn.Module, taps: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of named layers at each forward pass, within the block.

    Yields:
        A dictionary tap -> (N, F, d, h, w) of the latest forward pass.

    Raises:
        ConfigError: no such layer.
    """
    collected: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            collected[name] = output

        return hook

    handles = [find_module(network, t).register_forward_hook(keep(t)) for t in taps]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()


def tap_shapes(
    network: nn.Module, taps: Sequence[str], patch: Sequence[int], in_channels: int = 1
) -> dict[str, tuple[int, tuple[int, int, int]]]:
    """Per tap: number of channels F and stride (voxels per feature cell) along z, y, x.

    Passes the shape (1, in_channels, *patch) through the network. On torch's `meta` device this
    takes no arithmetic; a network that cannot go there computes one pass on zeros, and so does one
    that refuses the shape, for the words of its own error.

    Raises:
        ConfigError: no such layer, a patch that the network cannot take, or a layer whose output is
            no whole division of it.
    """
    for tap in taps:
        find_module(network, tap)
    features = _shapes_of(network, taps, (1, in_channels, *patch))
    shapes = {}
    for tap in taps:
        size = tuple(features[tap].shape[2:])
        if len(size) != 3 or any(n % m for n, m in zip(patch, size, strict=True)):
            raise ConfigError(
                f"layer {tap!r} gives {size} cells for a patch of {tuple(patch)} voxels.",
                where=type(network).__name__,
                fix="Tap a layer whose cells divide the patch evenly, or choose another patch.",
            )
        z, y, x = (n // m for n, m in zip(patch, size, strict=True))
        shapes[tap] = (int(features[tap].shape[1]), (z, y, x))
    return shapes


def output_shapes(
    network: nn.Module, patch: Sequence[int], in_channels: int = 1
) -> list[tuple[int, ...]]:
    """Shapes (C, D, H, W) of what a network gives while training, the final output first.

    An output that is no tensor of five axes has the shape ().

    Raises:
        ConfigError: a patch that the network cannot take.
    """
    from torch import Tensor

    # Two samples: batch normalisation of a single cell would refuse one.
    outputs = _shapes_of(network, [], (2, in_channels, *patch), training=True)
    found = (o.shape if isinstance(o, Tensor) else () for o in outputs.values())
    return [tuple(shape[1:]) if len(shape) == 5 else () for shape in found]


def _shapes_of(
    network: nn.Module, taps: Sequence[str], shape: Sequence[int], *, training: bool = False
) -> dict[str, Tensor]:
    """Outputs of the taps, or without taps of the network: shapes without values if it can."""
    found = _traced(network, taps, shape, training)
    if found is None:
        import torch

        try:
            with torch.random.fork_rng(devices=[]):
                found = _passed(copy.deepcopy(network), taps, shape, training)
        except (RuntimeError, ValueError) as error:
            first = str(error).split("\n")[0]
            raise ConfigError(
                f"the network cannot take a patch of {tuple(shape[2:])} voxels ({first}).",
                where="patch",
                fix="Most networks want multiples of all their strides multiplied.",
            ) from error
    return found


def _traced(
    network: nn.Module, taps: Sequence[str], shape: Sequence[int], training: bool
) -> dict[str, Tensor] | None:
    """Outputs of the taps, shapes without values; None if the network cannot do that."""
    try:
        return _passed(copy.deepcopy(network).to("meta"), taps, shape, training)
    except Exception:  # whatever it is, a real pass will tell
        return None


def _passed(
    network: nn.Module, taps: Sequence[str], shape: Sequence[int], training: bool
) -> dict[str, Tensor]:
    import torch

    parameter = next(network.parameters())
    network.train(training)
    with torch.no_grad(), tapped(network, taps) as features:
        out = network(torch.zeros(tuple(shape), device=parameter.device))
    outputs = out if isinstance(out, tuple) else (out,)
    return features if taps else {str(n): output for n, output in enumerate(outputs)}


def pick_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one; `cpu`, `cuda` and `cuda:1` mean themselves.

    Raises:
        ConfigError: a GPU was asked for and there is none, or an unknown name.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"{name!r} is no device.", where="--device", fix="Use auto, cpu, cuda or cuda:1."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "torch sees no CUDA GPU.",
            where=f"--device {name}",
            fix="Use --device cpu, or install a CUDA build of torch (README).",
        )
    return device
