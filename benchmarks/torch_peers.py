"""The networks that ours are compared with, in PyTorch; needs requirements-torch.txt."""

import timm
import torch
import torchvision
from torch import nn


class ContextBlock(nn.Module):
    """The paper's block (attention pooling, added), after the official repository's."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        hidden = int(channels * ratio)
        self.mask = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.LayerNorm([hidden, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Adds the same update to every position of `[batch, channel, height, width]`."""
        weights = self.mask(features).flatten(2).softmax(-1)
        context = features.flatten(2) @ weights.transpose(1, 2)
        return features + self.transform(context[..., None])


class Bottleneck(torchvision.models.resnet.Bottleneck):
    """torchvision's, with the block behind the last norm."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """As torchvision's, and the context before the sum."""
        shortcut = features if self.downsample is None else self.downsample(features)
        features = self.relu(self.bn1(self.conv1(features)))
        features = self.relu(self.bn2(self.conv2(features)))
        return self.relu(self.context(self.bn3(self.conv3(features))) + shortcut)


class BasicBlock(torchvision.models.resnet.BasicBlock):
    """torchvision's, with the block behind the last norm."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """As torchvision's, and the context before the sum."""
        shortcut = features if self.downsample is None else self.downsample(features)
        features = self.relu(self.bn1(self.conv1(features)))
        return self.relu(self.context(self.bn2(self.conv2(features))) + shortcut)


def add_context(network: nn.Module, stages: tuple[int, ...], ratio: float) -> nn.Module:
    """Puts the paper's block into every residual block of some stages of a torchvision ResNet."""
    for stage in stages:
        for block in getattr(network, f'layer{stage}'):
            wide = isinstance(block, torchvision.models.resnet.Bottleneck)
            block.__class__ = Bottleneck if wide else BasicBlock
            last = block.conv3 if wide else block.conv2
            block.context = ContextBlock(last.out_channels, ratio)
    return network


def small_resnet(
    stage_sizes: tuple[int, ...], widths: tuple[int, ...], num_classes: int = 10
) -> nn.Module:
    """CIFAR's ResNet of torchvision's blocks, with projection shortcuts and torchvision's names."""
    network, inputs = nn.Sequential(), widths[0]
    network.add_module('conv1', nn.Conv2d(3, inputs, 3, padding=1, bias=False))
    network.add_module('bn1', nn.BatchNorm2d(inputs))
    network.add_module('relu', nn.ReLU(inplace=True))
    for stage, (size, width) in enumerate(zip(stage_sizes, widths, strict=True), start=1):
        blocks = nn.Sequential()
        for index in range(size):
            stride = 2 if stage > 1 and index == 0 else 1
            shortcut = None
            if stride > 1 or inputs != width:
                shortcut = nn.Sequential(
                    nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
                )
            blocks.append(torchvision.models.resnet.BasicBlock(inputs, width, stride, shortcut))
            inputs = width
        network.add_module(f'layer{stage}', blocks)
    network.add_module('avgpool', nn.AdaptiveAvgPool2d(1))
    network.add_module('flatten', nn.Flatten())
    network.add_module('fc', nn.Linear(inputs, num_classes))
    return network


class GCCNNBlock(nn.Module):
    """Two 3x3 convolutions, the paper's block, then squeeze-excitation, and a projection."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            ContextBlock(width, 1 / 16),
            torchvision.ops.SqueezeExcitation(width, width // 16),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Sums the branch and the projection."""
        return torch.relu(self.branch(features) + self.shortcut(features))


# Blocks of each stage of CIFAR's ResNets, by our names.
SMALL = {'resnet20': (3, 3, 3), 'resnet56': (9, 9, 9)}
SMALL_WIDTHS = (16, 32, 64)


def build(name: str, num_classes: int | None = None) -> nn.Module:
    """Builds the peer of one of our networks, by our name.

    Args:
      name: Of our network.
      num_classes: Size of the classifier, for CIFAR's plain ResNets; None for 10.

    Raises:
      ValueError: It has none here.
    """
    if name in SMALL:
        return small_resnet(SMALL[name], SMALL_WIDTHS, num_classes or 10)
    if num_classes is not None:
        raise ValueError(f'{name} has no peer in PyTorch here with another classifier')
    if name == 'gc_resnet50':
        return add_context(torchvision.models.resnet50(), (2, 3, 4), 1 / 16)
    if name == 'gc_resnet20':
        return add_context(small_resnet(SMALL['resnet20'], SMALL_WIDTHS), (1, 2, 3), 1 / 4)
    if name == 'gccnn':
        widths = ((3, 64, 1), (64, 128, 2), (128, 256, 2))
        blocks = (GCCNNBlock(*width) for width in widths)
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))
    if hasattr(torchvision.models, name):
        return getattr(torchvision.models, name)()
    if timm.is_model(name):
        return timm.create_model(name)
    raise ValueError(f'{name} has no peer in PyTorch here')
