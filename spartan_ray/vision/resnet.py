"""ResNet18 (He et al., arXiv 1512.03385) with torchvision's parameter names, function and initial weights.

It is implemented here because importing torchvision takes a second and 90 MB in every worker."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from spartan_ray.vision.layers import FoldedBatchNorm2d, LiveConv2d


def _conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> LiveConv2d:
    return LiveConv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        # Created first, as in torchvision: the order decides which random numbers a layer gets.
        downsample = None
        if stride > 1:
            downsample = nn.Sequential(_conv(channels_in, channels_out, 1, stride), FoldedBatchNorm2d(channels_out))
        self.conv1 = _conv(channels_in, channels_out, 3, stride)
        self.bn1 = FoldedBatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(channels_out, channels_out, 3)
        self.bn2 = FoldedBatchNorm2d(channels_out)
        self.downsample = downsample

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        shortcut_NCHW = x_NCHW if self.downsample is None else self.downsample(x_NCHW)
        out_NCHW = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x_NCHW)))))
        out_NCHW += shortcut_NCHW
        return torch.relu_(out_NCHW)


def _stage(channels_in: int, channels_out: int) -> nn.Sequential:
    stride = 1 if channels_in == channels_out else 2
    return nn.Sequential(BasicBlock(channels_in, channels_out, stride), BasicBlock(channels_out, channels_out, 1))


class ResNet18(nn.Module):
    """Maps images to logits.

    classes    number of classes
    stem       first layers: imagenet (7x7 convolution with stride 2, max pooling) or cifar (3x3 convolution)
    width      channels of the first stage; the fourth has eight times as many"""

    def __init__(self, classes: int, stem: Literal["imagenet", "cifar"], width: int = 64) -> None:
        super().__init__()
        self.conv1 = _conv(3, width, 7, stride=2)
        self.bn1 = FoldedBatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(width, width)
        self.layer2 = _stage(width, 2 * width)
        self.layer3 = _stage(2 * width, 4 * width)
        self.layer4 = _stage(4 * width, 8 * width)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if stem == "cifar":
            self.conv1, self.maxpool = _conv(3, width, 3), nn.Identity()

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        # Pool before ReLU: the values and gradients are the same as in torchvision's order, which applies ReLU to four
        # times as many values.
        x_NCHW = self.relu(self.maxpool(self.bn1(self.conv1(x_NCHW))))
        x_NCHW = self.layer4(self.layer3(self.layer2(self.layer1(x_NCHW))))
        logits_NC: torch.Tensor = self.fc(self.avgpool(x_NCHW).flatten(1))
        return logits_NC
