"""Backbones: images (B, 3, H, W) in, a list of feature maps at strides 8, 16 and 32 out; if `fine`, also at 4.

`tiny` is a small residual network for the embedded data, trained from scratch. Any torchvision ResNet goes by its
name, with BatchNorm frozen as in every DETR. No backbone uses live batch statistics: GroupNorm here, frozen BatchNorm
there.
"""

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from semidetr_lite.errors import UserError


def make_backbone(backbone: str | nn.Module, weights: str | None = None, fine: bool = False) -> nn.Module:
    """A backbone by name ("tiny" or a torchvision ResNet), or the module given.

    Args:
        backbone: "tiny", "resnet18" ... "resnet152", or a module with `channels` and `sees_padding`.
        weights: name of torchvision weights ("IMAGENET1K_V1"), a path of a torchvision state dict, or None for random
            ones.
        fine: whether the map at stride 4 comes out too, of a backbone by name.
    """
    if isinstance(backbone, nn.Module):
        return backbone
    if backbone == "tiny":
        return Tiny(fine=fine)
    if backbone.startswith("resnet") and hasattr(torchvision.models, backbone):
        return ResNet(backbone, weights, fine)
    known = "give 'tiny' or the name of a torchvision ResNet such as 'resnet50'"
    raise UserError(f"no backbone called {backbone!r}: {known}")


def _convolution(before: int, width: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(before, width, 3, stride, padding=1, bias=False), nn.GroupNorm(8, width), nn.ReLU(inplace=True)]


class Residual(nn.Module):
    """Two 3x3 convolutions with GroupNorm around a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(*_convolution(channels, channels, 1), *_convolution(channels, channels, 1)[:2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.layers(x))


class Tiny(nn.Module):
    """A residual network for images of about 100 pixels: one strided convolution and one residual block at strides 4,
    8 and 16, the convolution alone at 2 and 32.

    Args:
        widths: channels at strides 2, 4, 8, 16 and 32.
        fine: whether the map at stride 4 comes out too.
    """

    sees_padding = False  # images of different sizes are run apart, so that GroupNorm never sees a padded border

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 96, 96), fine: bool = False):
        super().__init__()
        self.first = 1 if fine else 2
        self.channels = widths[self.first :]
        self.stages = nn.ModuleList()
        for number, (before, width) in enumerate(zip((3, *widths), widths, strict=False)):
            down = _convolution(before, width, 2)
            self.stages.append(nn.Sequential(*down, *([Residual(width)] if 1 <= number <= 3 else [])))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return _outputs(self.stages, images)[self.first :]


class ResNet(nn.Module):
    """A torchvision ResNet without its classifier; stem and first stage are not trained (as in the DETR family)."""

    sees_padding = True

    def __init__(self, name: str, weights: str | None = None, fine: bool = False):
        super().__init__()
        net = getattr(torchvision.models, name)(norm_layer=FrozenBatchNorm2d)
        if weights is not None:
            net.load_state_dict(_resnet_weights(name, weights), strict=False)  # the frozen norm has no batch counter
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layers = nn.ModuleList(Stage(*layer) for layer in (net.layer1, net.layer2, net.layer3, net.layer4))
        last_convs = [[part for part in layer.modules() if isinstance(part, nn.Conv2d)][-1] for layer in self.layers]
        self.first = 0 if fine else 1
        self.channels = tuple(conv.out_channels for conv in last_convs[self.first :])
        for part in (self.stem, self.layers[0]):
            part.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        convolution, norm, *_, pool = self.stem
        x = pool(_folded(images, convolution, *_factors([norm])[norm]).relu_())
        return _outputs(self.layers, x)[self.first :]


class Stage(nn.Sequential):
    """Blocks of a torchvision ResNet, with each frozen norm folded into the convolution before it.

    What torchvision's own blocks compute, to rounding; a norm of its own is seven operations, two of them on whole
    maps, which it turns into float32 under bfloat16.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factors = _factors([part for part in self.modules() if isinstance(part, FrozenBatchNorm2d)])
        for block in self:
            down, last = block.downsample, 3 if hasattr(block, "conv3") else 2
            shortcut = _folded(x, down[0], *factors[down[1]]) if down is not None else x
            for number in range(1, last + 1):
                x = _folded(x, getattr(block, f"conv{number}"), *factors[getattr(block, f"bn{number}")])
                x = (x if number < last else x + shortcut).relu_()
        return x


def _factors(norms: list[FrozenBatchNorm2d]) -> dict[FrozenBatchNorm2d, tuple[torch.Tensor, torch.Tensor]]:
    """What each frozen norm multiplies channels by and then adds to them, (C,) each, worked out for all at once."""
    names = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, variance = (torch.cat([getattr(norm, name) for norm in norms]) for name in names)
    scale = weight * (variance + norms[0].eps).rsqrt()
    parts = (entry.split([len(norm.bias) for norm in norms]) for entry in (scale, bias - mean * scale))
    return dict(zip(norms, zip(*parts, strict=True), strict=True))


def _folded(x: torch.Tensor, convolution: nn.Conv2d, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """A convolution without bias, then a frozen norm's factors, as one convolution."""
    weight, own = convolution.weight * scale[:, None, None, None], convolution
    return F.conv2d(x, weight, shift, own.stride, own.padding, own.dilation, own.groups)


def _outputs(stages, x: torch.Tensor) -> list[torch.Tensor]:
    """What each of the stages makes of the one before it."""
    return [x := stage(x) for stage in stages]


def _resnet_weights(name: str, weights: str) -> dict:
    """A torchvision state dict, from a local file or by torchvision's name (downloaded once)."""
    try:
        if weights.endswith((".pth", ".pt")):
            return torch.load(weights, map_location="cpu", weights_only=True)
        return torchvision.models.get_model_weights(name)[weights].get_state_dict()
    except Exception as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        advice = "give a .pth file of torchvision's, or 'none' for random ones (--backbone-weights)"
        raise UserError(f"cannot get the {name} weights {weights!r} ({reason}): {advice}") from None
