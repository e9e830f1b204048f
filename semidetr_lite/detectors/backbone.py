"""Backbones: images (B, 3, H, W) -> feature maps at strides 8, 16 and 32; on request also at 4.

`tiny` is a small residual network for the embedded data, trained from scratch. Any torchvision
ResNet goes by its name, with frozen BatchNorm as in every DETR, and so does any model of timm with
maps at these strides (timm_backbone.py). No backbone uses live batch statistics: the tiny one has
GroupNorm, the others have frozen BatchNorm.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from semidetr_lite.detectors.weight_files import is_weights_file, read_tensors
from semidetr_lite.errors import UserError

TIMM = "timm:"  # before the name of a backbone of timm's


class Backbone(nn.Module):
    """What a detector asks of its backbone; any module with these attributes is one."""

    channels: tuple[int, ...]  # of each map
    # whether images of different sizes are padded and run together, see Detector.extract_features
    pad_before_backbone: bool


def make_backbone(
    backbone: str | nn.Module, weights: str | None = None, with_stride_4: bool = False
) -> Backbone:
    """A backbone by name ("tiny" or a torchvision ResNet), or the module given.

    Args:
        backbone: "tiny", "resnet18" ... "resnet152", "timm:NAME", or a module with the attributes
            of Backbone.
        weights: name of torchvision weights ("IMAGENET1K_V1"), path of a file that holds them
            (torchvision's, or a published detector's with this backbone), or None for random
            weights. Of a timm model: a file, or any other word for timm's own weights.
        with_stride_4: whether the map at stride 4 comes out too, of a backbone by name.

    Raises:
        UserError: an unknown name, or weights that cannot be read or do not fit.
    """
    if isinstance(backbone, nn.Module):
        return cast(Backbone, backbone)
    if backbone == "tiny":
        return Tiny(with_stride_4=with_stride_4)
    if backbone.startswith("resnet") and hasattr(torchvision.models, backbone):
        return ResNet(backbone, weights, with_stride_4)
    if backbone.startswith(TIMM):
        from semidetr_lite.detectors.timm_backbone import TimmBackbone  # an extra

        return TimmBackbone(backbone.removeprefix(TIMM), weights, with_stride_4)
    advice = "give 'tiny', a torchvision ResNet such as 'resnet50', or 'timm:' and a name of timm's"
    raise UserError(f"no backbone called {backbone!r}: {advice}")


def _conv_norm_relu(input_channels: int, channels: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(input_channels, channels, 3, stride, padding=1, bias=False),
        nn.GroupNorm(8, channels),
        nn.ReLU(inplace=True),
    ]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm and a residual connection: (B, C, H, W) -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        first = _conv_norm_relu(channels, channels, stride=1)
        second = _conv_norm_relu(channels, channels, stride=1)[:2]  # the ReLU follows the sum
        self.layers = nn.Sequential(*first, *second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B, C, H, W) from features of the same shape."""
        return torch.relu(x + self.layers(x))


class Tiny(Backbone):
    """A residual network for images of about 100 pixels.

    A strided convolution at strides 2, 4, 8, 16 and 32; at strides 4, 8 and 16 a residual block
    follows it.

    Args:
        widths: channels at strides 2, 4, 8, 16 and 32.
        with_stride_4: whether the map at stride 4 comes out too.
    """

    pad_before_backbone = False  # GroupNorm would count the padding

    def __init__(
        self,
        widths: tuple[int, ...] = (24, 48, 96, 96, 96),
        with_stride_4: bool = False,
    ):
        super().__init__()
        self.first_output = 1 if with_stride_4 else 2
        self.channels = widths[self.first_output :]
        self.stages = nn.ModuleList()
        for index, (input_channels, width) in enumerate(zip((3, *widths), widths, strict=False)):
            layers = _conv_norm_relu(input_channels, width, stride=2)
            if 1 <= index <= 3:
                layers.append(ResidualBlock(width))
            self.stages.append(nn.Sequential(*layers))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The maps (B, C, H, W) of images (B, 3, H, W), from the finest to the coarsest."""
        return _stage_outputs(self.stages, images)[self.first_output :]


class ResNet(Backbone):
    """A torchvision ResNet without its classifier.

    Stem and first stage are not trained (as in the DETR family).

    Args:
        name: "resnet18" ... "resnet152".
        weights, with_stride_4: see `make_backbone`.
    """

    pad_before_backbone = True

    def __init__(self, name: str, weights: str | None = None, with_stride_4: bool = False):
        super().__init__()
        net = getattr(torchvision.models, name)(norm_layer=FrozenBatchNorm2d)
        if weights is not None:
            # not strict: the classifier is not taken
            net.load_state_dict(_resnet_weights(name, weights, net.state_dict()), strict=False)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        stages = (net.layer1, net.layer2, net.layer3, net.layer4)
        self.layers = nn.ModuleList(FusedStage(*stage) for stage in stages)
        self.first_output = 0 if with_stride_4 else 1
        channels = tuple(_last_conv(stage).out_channels for stage in stages)
        self.channels = channels[self.first_output :]
        self.stem.requires_grad_(False)
        self.layers[0].requires_grad_(False)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The maps (B, C, H, W) of images (B, 3, H, W), from the finest to the coarsest."""
        conv, norm, _, pool = self.stem
        scale, shift = _fold_frozen_bn([norm])[norm]
        x = pool(_conv_frozen_bn(images, cast(nn.Conv2d, conv), scale, shift).relu_())
        return _stage_outputs(self.layers, x)[self.first_output :]


class FusedStage(nn.Sequential):
    """The blocks of a torchvision ResNet stage, each frozen norm folded into its convolution.

    The result is that of torchvision's own blocks, up to rounding. A frozen norm alone is seven
    operations; two of them run on whole maps and turn them into float32 under bfloat16.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The stage's map (B, C, H, W) from the map of the stage before."""
        norms = [module for module in self.modules() if isinstance(module, FrozenBatchNorm2d)]
        folded = _fold_frozen_bn(norms)
        block: Any  # torchvision's BasicBlock or Bottleneck
        for block in self:
            shortcut = x
            if block.downsample is not None:
                conv, norm = block.downsample
                shortcut = _conv_frozen_bn(x, conv, *folded[norm])
            num_convs = 3 if hasattr(block, "conv3") else 2
            for number in range(1, num_convs + 1):
                conv = getattr(block, f"conv{number}")
                norm = getattr(block, f"bn{number}")
                x = _conv_frozen_bn(x, conv, *folded[norm])
                x = (x + shortcut if number == num_convs else x).relu_()
        return x


def _fold_frozen_bn(
    norms: list[FrozenBatchNorm2d],
) -> dict[FrozenBatchNorm2d, tuple[torch.Tensor, torch.Tensor]]:
    """Each norm as (scale, shift), (C,) each: it computes x * scale + shift per channel.

    All norms are computed at once, in a few operations on long vectors.
    """
    weight = torch.cat([norm.weight for norm in norms])
    bias = torch.cat([norm.bias for norm in norms])
    mean = torch.cat([norm.running_mean for norm in norms])
    variance = torch.cat([norm.running_var for norm in norms])
    scale = weight * (variance + norms[0].eps).rsqrt()
    shift = bias - mean * scale
    channels = [len(norm.bias) for norm in norms]
    pairs = zip(scale.split(channels), shift.split(channels), strict=True)
    return dict(zip(norms, pairs, strict=True))


def _conv_frozen_bn(
    x: torch.Tensor, conv: nn.Conv2d, scale: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """A convolution without bias and the frozen norm behind it, as one convolution.

    Args:
        x: (B, C', H', W').
        conv: C' to C channels.
        scale, shift: (C,), see _fold_frozen_bn.
    """
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


def _last_conv(stage: nn.Module) -> nn.Conv2d:
    return [module for module in stage.modules() if isinstance(module, nn.Conv2d)][-1]


def _stage_outputs(stages: Iterable[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """Run the stages one after the other; the output of each."""
    outputs = []
    for stage in stages:
        x = stage(x)
        outputs.append(x)
    return outputs


def _resnet_weights(name: str, weights: str, expected: dict) -> dict:
    """A torchvision state dict, from a local file or by torchvision's name (downloaded once).

    Args:
        name: of the ResNet.
        weights: a file, or torchvision's name of weights. A file may be a whole detector's.
        expected: the state dict to fill; all its entries but the classifier's must be there.

    Raises:
        UserError: it cannot be read or downloaded, or it does not fit.
    """
    if is_weights_file(weights):
        tensors = _backbone_entries(read_tensors(Path(weights)))
    else:
        try:
            tensors = torchvision.models.get_model_weights(name)[weights].get_state_dict()
        except Exception as problem:
            reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
            advice = "give a .pth file of torchvision's, or 'none' for random ones"
            words = f"cannot get the {name} weights {weights!r} ({reason})"
            raise UserError(f"{words}: {advice} (--backbone-weights)") from None
    needed = [key for key in expected if not key.startswith("fc.")]
    missing = [
        key for key in needed if key not in tensors or tensors[key].shape != expected[key].shape
    ]
    if missing:
        fits = f"{len(needed) - len(missing)} of the {len(needed)} entries of a {name}"
        fault = f"holds {fits}, the first that lacks is {missing[0]}"
        raise UserError(f"{weights}: {fault}; give --backbone-weights a file of that network")
    return {key: tensors[key] for key in needed}


def _backbone_entries(tensors: dict) -> dict:
    """The entries of the backbone in a file of a whole detector, by torchvision's names."""
    for key in tensors:
        prefix, found, _ = key.partition("conv1.weight")
        if found and "layer" not in prefix:
            return {
                name.removeprefix(prefix): value
                for name, value in tensors.items()
                if name.startswith(prefix)
            }
    return tensors
