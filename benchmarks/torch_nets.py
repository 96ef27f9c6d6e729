"""PyTorch's side: the same networks, and the same training step, in PyTorch's own way.

Parameters have the names that `cvjax.interop.torch` reads: akamaster's for CIFAR ResNets,
torchvision's for the others. Zeros for new channels stand where cvjax has them by default.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils import checkpoint as checkpoints

from cvjax.models import resnet, resnet_cifar, vgg


class Pad(nn.Module):
    """Option A: every second pixel, and zeros for the new channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.channels))


class Block(nn.Module):
    """Convolutions with BatchNorm and ReLU between, and a shortcut.

    Args:
      shapes: channels, features, kernel and stride of each convolution.
      around: the shortcut, None for the identity.
      name: of its parameters, if it has any.
    """

    def __init__(self, shapes, around: nn.Module | None, name: str):
        super().__init__()
        self.count, self.shortcut_name = len(shapes), name
        for k, (channels, features, kernel, stride) in enumerate(shapes, start=1):
            pad = kernel // 2
            conv = nn.Conv2d(channels, features, kernel, stride, pad, bias=False)
            self.add_module(f"conv{k}", conv)
            self.add_module(f"bn{k}", nn.BatchNorm2d(features))
        self.add_module(name, around or nn.Identity())

    def forward(self, x):
        y = x
        for k in range(1, self.count + 1):
            y = getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(y))
            if k < self.count:
                y = functional.relu(y)
        return functional.relu(y + getattr(self, self.shortcut_name)(x))


class Residual(nn.Module):
    """A stem, stages of blocks, global average and a dense head.

    Attributes:
      recompute: whether blocks are computed again for the gradient instead of kept.
    """

    def __init__(self, stem: nn.Module, stages: list[nn.Sequential], head_name: str, head):
        super().__init__()
        self.recompute, self.head_name, self.stages = False, head_name, len(stages)
        self.conv1, self.bn1, self.pool = stem
        for number, stage in enumerate(stages, start=1):
            self.add_module(f"layer{number}", stage)
        self.add_module(head_name, head)

    def forward(self, x):
        x = self.pool(functional.relu(self.bn1(self.conv1(x))))
        for number in range(1, self.stages + 1):
            for block in getattr(self, f"layer{number}"):
                if self.recompute:
                    x = checkpoints.checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
        return getattr(self, self.head_name)(x.mean((2, 3)))


def create_cifar_resnet(net: resnet_cifar.CifarResNet) -> nn.Module:
    """The net of He et al. 2015, section 4.2, with option A."""
    before, stages = net.width, []
    for number, count in enumerate(net.stage_blocks):
        features, blocks = net.width * 2**number, []
        for k in range(count):
            changes = number > 0 and k == 0
            shapes = (
                (before, features, 3, 2 if changes else 1),
                (features, features, 3, 1),
            )
            around = Pad(features - before) if changes else None
            blocks.append(Block(shapes, around, "shortcut"))
            before = features
        stages.append(nn.Sequential(*blocks))
    conv = nn.Conv2d(3, net.width, 3, 1, 1, bias=False)
    stem = (conv, nn.BatchNorm2d(net.width), nn.Identity())
    return Residual(stem, stages, "linear", nn.Linear(before, net.num_classes))


def create_resnet(net: resnet.ResNet) -> nn.Module:
    """The net of He et al. 2015, Table 1, with projections where shapes change."""
    small, deep = net.stem == "small", net.depth >= 50
    before, stages = net.width, []
    for number, count in enumerate(resnet.STAGES[net.depth]):
        inner = net.width * 2**number
        features, blocks = inner * (resnet.EXPANSION if deep else 1), []
        for k in range(count):
            stride = 2 if number > 0 and k == 0 else 1
            shapes = ((before, features, 3, stride), (features, features, 3, 1))
            if deep:
                shapes = (
                    (before, inner, 1, 1),
                    (inner, inner, 3, stride),
                    (inner, features, 1, 1),
                )
            around = None
            if stride != 1 or before != features:
                conv = nn.Conv2d(before, features, 1, stride, bias=False)
                around = nn.Sequential(conv, nn.BatchNorm2d(features))
            blocks.append(Block(shapes, around, "downsample"))
            before = features
        stages.append(nn.Sequential(*blocks))
    shape = (3, 1, 1) if small else (7, 2, 3)
    conv = nn.Conv2d(3, net.width, *shape, bias=False)
    pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
    stem = (conv, nn.BatchNorm2d(net.width), pool)
    return Residual(stem, stages, "fc", nn.Linear(before, net.num_classes))


class SmallVGG(nn.Module):
    """VGG with BatchNorm and one dense layer."""

    def __init__(self, net: vgg.VGG):
        super().__init__()
        layers, before = [], 3
        for number, count in enumerate(vgg.STAGES[net.depth]):
            features = net.width * min(2**number, 8)
            for _ in range(count):
                conv = nn.Conv2d(before, features, 3, 1, 1)
                layers += [conv, nn.BatchNorm2d(features), nn.ReLU(inplace=True)]
                before = features
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(before, net.num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


CREATORS: dict[type, Callable[[Any], nn.Module]] = {
    resnet_cifar.CifarResNet: create_cifar_resnet,
    resnet.ResNet: create_resnet,
    vgg.VGG: SmallVGG,
}


def create(net) -> nn.Module:
    """The PyTorch network with the function and the parameters of one of cvjax's."""
    return CREATORS[type(net)](net)


def pick_device(platform: str) -> torch.device:
    """The device that JAX computes on, for PyTorch."""
    return torch.device("cuda" if platform == "gpu" else "cpu")


def augment(images, mean, padding: int):
    """uint8 [batch, height, width, channels] -> normalised, cropped and flipped, NCHW.

    As `cvjax.data.augment`, for the whole batch at once: a crop of the original size from
    the image padded with zeros, and a flip of half of the images.
    """
    count, height, width, _ = images.shape
    x = images.float() / 255 - mean
    x = functional.pad(x, (0, 0, padding, padding, padding, padding))
    device = images.device
    corners = torch.randint(0, 2 * padding + 1, (2, count, 1), device=device)
    rows = corners[0] + torch.arange(height, device=device)
    columns = corners[1] + torch.arange(width, device=device)
    flipped = torch.rand(count, 1, device=device) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    numbers = torch.arange(count, device=device)
    x = x[numbers[:, None, None], rows[:, :, None], columns[:, None, :]]
    return x.permute(0, 3, 1, 2)  # in memory the channels stay last


def create_step(
    net: nn.Module,
    mean: np.ndarray,
    device: torch.device,
    *,
    half: bool = False,
    padding: int = 4,
    compiled: bool = False,
) -> Callable[[dict[str, np.ndarray]], None]:
    """A training step in the manner of PyTorch: channels last, SGD with momentum.

    Args:
      net: the network.
      mean: float [height, width, channels], subtracted from images in [0, 1].
      device: where to compute.
      half: whether convolutions are in bfloat16 (autocast).
      padding: see `augment`.
      compiled: whether `torch.compile` compiles forward and backward pass.

    Returns:
      A function of a batch of "image" (uint8, NHWC) and "label" (int32), which does one
      update and waits for it.
    """
    net = net.to(device, memory_format=torch.channels_last).train()
    optimizer = create_optimizer(net)
    mean = torch.as_tensor(np.array(mean), device=device)

    def loss_of(images, labels):
        x = augment(images, mean, padding)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = net(x)
        return functional.cross_entropy(logits.float(), labels)

    if compiled:
        torch.compiler.reset()  # or else nets of other shapes make all shapes variable
        loss_of = torch.compile(loss_of, dynamic=False)

    def step(batch):
        images = torch.from_numpy(batch["image"]).to(device)
        labels = torch.from_numpy(batch["label"]).to(device).long()
        optimizer.zero_grad(set_to_none=True)
        loss_of(images, labels).backward()
        optimizer.step()
        synchronize(device)

    return step


def create_optimizer(net: nn.Module) -> torch.optim.Optimizer:
    """As `benchmarks.nets.create_recipe` has it."""
    return torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
