"""Backbones give maps at strides 8, 16 and 32, and never look at their neighbours in the batch."""

import pytest
import torch
import torchvision

from semidetr_lite.detectors.backbone import ResNet, Tiny, make_backbone
from semidetr_lite.errors import UserError


@pytest.mark.parametrize("backbone", [Tiny(), make_backbone("resnet18")], ids=["tiny", "resnet18"])
def test_maps_at_strides_8_16_and_32(backbone):
    maps = backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(level.shape[-2:]) for level in maps] == [(8, 12), (4, 6), (2, 3)]
    assert tuple(level.shape[1] for level in maps) == tuple(backbone.channels)


@pytest.mark.parametrize("backbone", [Tiny((8, 8, 16, 16, 16)), make_backbone("resnet18")], ids=["tiny", "resnet18"])
def test_no_batch_statistics(backbone):
    """In training mode too, an image gives the same maps alone and beside others, and nothing is counted."""
    images, before = torch.rand(3, 3, 64, 64), [buffer.clone() for buffer in backbone.buffers()]
    together, alone = backbone.train()(images), backbone.train()(images[:1])
    assert all(torch.allclose(a[:1], b, atol=1e-4) for a, b in zip(together, alone))
    assert all(torch.equal(a, b) for a, b in zip(backbone.buffers(), before))


def test_resnet_equals_torchvisions_with_the_same_weights(tmp_path):
    net = torchvision.models.resnet18().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    backbone, image = make_backbone("resnet18", str(tmp_path / "weights.pth")), torch.rand(1, 3, 64, 64)
    x = net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(image))))))
    expected = [x, net.layer3(x), net.layer4(net.layer3(x))]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(backbone(image), expected))


def test_stem_and_first_stage_are_not_trained():
    backbone = ResNet("resnet18")
    frozen = {name.split(".")[0] + name.split(".")[1] for name, p in backbone.named_parameters() if not p.requires_grad}
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
