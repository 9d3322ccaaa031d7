"""The networks that checkpoints come from, built in PyTorch; needs requirements-torch.txt.

timm's and torchvision's are their own. The paper's block is written after the official repository's
and mmcv's `ContextBlock`, the seed's GC-CNN after its description, and the CIFAR ResNet after
akamaster/pytorch_resnet_cifar10, since none of them can be installed.
"""

import timm
import torch
import torchvision
from torch import nn


class ContextBlock(nn.Module):
    """mmcv's and the official repository's global context block."""

    def __init__(self, channels, ratio, pooling_type='att', fusion_types=('channel_add',)):
        super().__init__()
        planes = int(channels * ratio)
        self.pooling_type = pooling_type
        if pooling_type == 'att':
            self.conv_mask = nn.Conv2d(channels, 1, kernel_size=1)

        def transform():
            return nn.Sequential(
                nn.Conv2d(channels, planes, kernel_size=1),
                nn.LayerNorm([planes, 1, 1]),
                nn.ReLU(),
                nn.Conv2d(planes, channels, kernel_size=1),
            )

        self.channel_add_conv = transform() if 'channel_add' in fusion_types else None
        self.channel_mul_conv = transform() if 'channel_mul' in fusion_types else None

    def forward(self, x):
        batch, channels, height, width = x.shape
        if self.pooling_type == 'att':
            mask = self.conv_mask(x).view(batch, 1, height * width).softmax(dim=2)
            context = torch.matmul(
                x.view(batch, 1, channels, height * width), mask.unsqueeze(-1)
            ).view(batch, channels, 1, 1)
        else:
            context = x.mean(dim=(2, 3), keepdim=True)
        out = x
        if self.channel_mul_conv is not None:
            out = out * torch.sigmoid(self.channel_mul_conv(context))
        if self.channel_add_conv is not None:
            out = out + self.channel_add_conv(context)
        return out


class GCBottleneck(torchvision.models.resnet.Bottleneck):
    """torchvision's, with the paper's block behind the last norm, before the sum."""

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.context_block(self.bn3(self.conv3(out)))
        return self.relu(out + identity)


def paper_network(ratio=1 / 16, stages=(2, 3, 4), constructor='resnet50', **options):
    """The paper's GC network as mmdetection's backbone has it, with torchvision's classifier."""
    network = getattr(torchvision.models, constructor)(**options)
    for stage in stages:
        for block in getattr(network, f'layer{stage}'):
            block.__class__ = GCBottleneck
            block.context_block = ContextBlock(block.conv3.out_channels, ratio)
    return network


class _SamePadding(nn.Module):
    """The seed wraps its convolutions: the names have `.conv` in them."""

    def __init__(self, *arguments, **options):
        super().__init__()
        self.conv = nn.Conv2d(*arguments, **options)

    def forward(self, x):
        return self.conv(x)


class _SeedTransform(nn.Module):
    def __init__(self, channels, hidden):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 1)
        self.ln = nn.LayerNorm([hidden, 1, 1])
        self.conv2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, context):
        return self.conv2(torch.relu(self.ln(self.conv1(context))))


class SeedBlock(nn.Module):
    """Two 3x3 convolutions, then global context (attention, add), then squeeze-excitation."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        hidden = max(1, channels // 16)
        self.conv1 = _SamePadding(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _SamePadding(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential(
            _SamePadding(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
        )
        self.attn = _SamePadding(channels, 1, 1)
        self.gc_transform = _SeedTransform(channels, hidden)
        self.se_fc1 = nn.Conv2d(channels, hidden, 1)
        self.se_fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        weights = self.attn(out).flatten(1).softmax(dim=1)
        context = torch.einsum('bp,bcp->bc', weights, out.flatten(2))[..., None, None]
        out = out + self.gc_transform(context)
        squeezed = out.mean(dim=(2, 3), keepdim=True)
        out = out * torch.sigmoid(self.se_fc2(torch.relu(self.se_fc1(squeezed))))
        return torch.relu(out + self.downsample(x))


class SeedNetwork(nn.Module):
    """The seed's GC-CNN."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.layer1 = SeedBlock(3, 64, 1)
        self.layer2 = SeedBlock(64, 128, 2)
        self.layer3 = SeedBlock(128, 256, 2)
        self.fc = nn.Linear(256, num_classes)

    def forward(self, x):
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3)))


class ZeroPad(nn.Module):
    """A shortcut without parameters: half of the new channels on each side."""

    def forward(self, x):
        side = x.shape[1] // 2
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, side, side))


class CifarNetwork(nn.Module):
    """The paper's CIFAR ResNet with zero-padded shortcuts, of torchvision's blocks."""

    def __init__(self, blocks=3, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        basic = torchvision.models.resnet.BasicBlock
        for stage, width in enumerate((16, 32, 64), start=1):
            first = basic(16, 16) if stage == 1 else basic(width // 2, width, 2, ZeroPad())
            rest = (basic(width, width) for _ in range(blocks - 1))
            setattr(self, f'layer{stage}', nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3)))


TIMM = (
    'gcresnext26ts',
    'gcresnet33ts',
    'gcresnet50t',
    'gcresnext50ts',
    'gc_efficientnetv2_rw_t',
)
TORCHVISION = ('resnet18', 'resnet50', 'resnext50_32x4d')


def build(name: str) -> nn.Module:
    """A peer in evaluation mode, by the name of the network here."""
    if name in TIMM:
        network = timm.create_model(name)
    elif name in TORCHVISION:
        network = getattr(torchvision.models, name)()
    elif name == 'gccnn':
        network = SeedNetwork()
    elif name == 'resnet20_a':
        network = CifarNetwork()
    elif name == 'gc_resnet50':
        network = paper_network()
    else:
        raise ValueError(name)
    return network.eval()
