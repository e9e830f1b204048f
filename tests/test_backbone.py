"""Backbones give maps at strides 8, 16 and 32, and never look at their neighbours in the batch."""

import pytest
import torch
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from semidetr_lite.detectors.backbone import ResNet, Tiny, make_backbone
from semidetr_lite.errors import UserError


@pytest.mark.parametrize("backbone", [Tiny(), make_backbone("resnet18")], ids=["tiny", "resnet18"])
def test_maps_at_strides_8_16_and_32(backbone):
    maps = backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(level.shape[-2:]) for level in maps] == [(8, 12), (4, 6), (2, 3)]
    assert tuple(level.shape[1] for level in maps) == tuple(backbone.channels)


@pytest.mark.parametrize(
    "backbone", [Tiny((8, 8, 16, 16, 16)), make_backbone("resnet18")], ids=["tiny", "resnet18"]
)
def test_no_batch_statistics(backbone):
    """In training mode too an image has the same maps alone and in a batch; buffers stay."""
    images, before = torch.rand(3, 3, 64, 64), [buffer.clone() for buffer in backbone.buffers()]
    together, alone = backbone.train()(images), backbone.train()(images[:1])
    assert all(torch.allclose(a[:1], b, atol=1e-4) for a, b in zip(together, alone))
    assert all(torch.equal(a, b) for a, b in zip(backbone.buffers(), before))


@pytest.fixture(params=["resnet18", "resnet50"])
def twins(request, tmp_path):
    """A torchvision ResNet in eval mode with random norms, and ours with its weights."""
    net = getattr(torchvision.models, request.param)().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for name, low, high in (
                ("running_mean", -0.5, 0.5),
                ("running_var", 0.5, 2),
                ("weight", 0.5, 1),
            ):
                torch.nn.init.uniform_(getattr(module, name), low, high)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    return net, make_backbone(request.param, str(tmp_path / "weights.pth"))


def torchvisions_maps(net, images):
    x = net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images))))))
    return [x, net.layer3(x), net.layer4(net.layer3(x))]


def test_resnet_equals_torchvisions_with_the_same_weights(twins):
    """Norms folded into convolutions change nothing: maps and gradients of the weights."""
    net, backbone = twins
    images = torch.rand(2, 3, 64, 96)
    expected, maps = torchvisions_maps(net, images), backbone(images)
    for a, b in zip(maps, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.detach().abs().max()))
    towards = [torch.randn_like(level) for level in expected]
    for each in (expected, maps):
        sum((level * way).sum() for level, way in zip(each, towards, strict=True)).backward()
    pairs = [
        (backbone.layers[1], net.layer2),
        (backbone.layers[2], net.layer3),
        (backbone.layers[3], net.layer4),
    ]
    for ours, theirs in pairs:
        convolutions = [
            [part.weight for part in each.modules() if isinstance(part, torch.nn.Conv2d)]
            for each in (ours, theirs)
        ]
        for a, b in zip(*convolutions, strict=True):
            assert (a.grad - b.grad).norm() < 1e-3 * b.grad.norm()


def test_no_map_of_a_resnet_becomes_float32_under_bfloat16(twins):
    seen = []
    with torch.autocast("cpu", torch.bfloat16), Dtypes(seen):
        maps = twins[1](torch.rand(2, 3, 64, 96))
    assert {level.dtype for level in maps} == {torch.bfloat16}
    assert {
        dtype for shape, dtype in seen if len(shape) == 4 and shape[0] == 2 and shape[1] > 3
    } == {torch.bfloat16}


class Dtypes(TorchDispatchMode):
    """Notes (shape, dtype) of everything that is computed."""

    def __init__(self, seen: list):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.seen += [
            (each.shape, each.dtype)
            for each in tree_leaves(found)
            if isinstance(each, torch.Tensor) and each.is_floating_point()
        ]
        return found


def test_stem_and_first_stage_are_not_trained():
    backbone = ResNet("resnet18")
    frozen = {
        name.split(".")[0] + name.split(".")[1]
        for name, p in backbone.named_parameters()
        if not p.requires_grad
    }
    assert frozen == {"stem0", "layers0"}


def test_bottleneck_channels():
    with torch.device("meta"):
        assert ResNet("resnet50").channels == (512, 1024, 2048)


def test_what_is_no_backbone():
    module = Tiny((8, 8, 16, 16, 16))
    assert make_backbone(module) is module
    for name in ("resnet19", "vgg16", "Tiny"):
        with pytest.raises(UserError, match=name):
            make_backbone(name)
    with pytest.raises(UserError, match="nowhere.pth") as problem:
        make_backbone("resnet18", "nowhere.pth")
    assert "\n" not in str(problem.value)
