"""PyTorch's nets, written down again, with random weights.

The names are those of torchvision (as of 0.20) and of akamaster/pytorch_resnet_cifar10.
"""

from test_interop_names import BLOCKS, INCEPTIONS, VGG_LAYERS

try:
    import torch
except ModuleNotFoundError:
    torch = None


def layers(*modules):
    return torch.nn.Sequential(*modules)


def conv_bn(channels, features, kernel, stride=1):
    conv2d = torch.nn.Conv2d(
        channels, features, kernel, stride, padding=kernel // 2, bias=False
    )
    return conv2d, torch.nn.BatchNorm2d(features)


def torch_block(kind, before, features, stride, shortcut, expansion=1):
    """`shortcut` is a module, or None for the identity; it is named as `kind` does."""
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            after = features * expansion
            shapes = [(before, features, 3, stride), (features, features, 3, 1)]
            if expansion > 1:
                shapes = [
                    (before, features, 1, 1),
                    (features, features, 3, stride),
                    (features, after, 1, 1),
                ]
            self.count = len(shapes)
            for k, shape in enumerate(shapes, start=1):
                conv2d, bn = conv_bn(*shape)
                self.add_module(f"conv{k}", conv2d)
                self.add_module(f"bn{k}", bn)
            if shortcut is not None:
                self.add_module(kind, shortcut)

        def forward(self, x):
            y = x
            for k in range(1, self.count + 1):
                y = getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(y))
                y = y if k == self.count else nn.functional.relu(y)
            around = x if shortcut is None else getattr(self, kind)(x)
            return nn.functional.relu(y + around)

    return Block()


def torch_cifar(depth, width, num_classes, shortcut="A", blocks=()):
    nn, functional = torch.nn, torch.nn.functional
    counts = blocks or ((depth - 2) // 6,) * 3

    class Pad(nn.Module):
        def __init__(self, planes):
            super().__init__()
            self.pads = (0, 0, 0, 0, planes // 4, planes // 4)

        def forward(self, x):
            return functional.pad(x[:, :, ::2, ::2], self.pads, "constant", 0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = conv_bn(3, width, 3)
            before = width
            for stage in (1, 2, 3):
                planes, blocks = width * 2 ** (stage - 1), []
                for block in range(counts[stage - 1]):
                    stride = 2 if stage > 1 and block == 0 else 1
                    around = None
                    if stride == 2:
                        around = Pad(planes)
                        if shortcut == "B":
                            around = layers(*conv_bn(before, planes, 1, 2))
                    blocks.append(torch_block("shortcut", before, planes, stride, around))
                    before = planes
                self.add_module(f"layer{stage}", layers(*blocks))
            self.linear = nn.Linear(before, num_classes)

        def forward(self, x):
            x = functional.relu(self.bn1(self.conv1(x)))
            x = self.layer3(self.layer2(self.layer1(x)))
            return self.linear(functional.avg_pool2d(x, x.shape[3]).flatten(1))

    return Net()


def torch_resnet(depth, width, num_classes, stem="imagenet"):
    nn, functional = torch.nn, torch.nn.functional
    first = (7, 2) if stem == "imagenet" else (3, 1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = conv_bn(3, width, *first)
            before, expansion = width, 1 if depth < 50 else 4
            for stage, count in enumerate(BLOCKS[depth], start=1):
                planes, blocks = width * 2 ** (stage - 1), []
                for block in range(count):
                    stride = 2 if stage > 1 and block == 0 else 1
                    around = None
                    if stride == 2 or before != planes * expansion:
                        around = layers(*conv_bn(before, planes * expansion, 1, stride))
                    blocks.append(
                        torch_block("downsample", before, planes, stride, around, expansion)
                    )
                    before = planes * expansion
                self.add_module(f"layer{stage}", layers(*blocks))
            self.fc = nn.Linear(before, num_classes)

        def forward(self, x):
            x = functional.relu(self.bn1(self.conv1(x)))
            if stem == "imagenet":
                x = functional.max_pool2d(x, 3, 2, padding=1)
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return self.fc(x.mean((2, 3)))

    return Net()


def torch_dense_net(features, side, classifier):
    nn = torch.nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = features
            self.avgpool = nn.AdaptiveAvgPool2d(side)
            self.classifier = classifier

        def forward(self, x):
            return self.classifier(self.avgpool(self.features(x)).flatten(1))

    return Net()


def torch_alexnet(hidden, num_classes):
    nn = torch.nn
    features = layers(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    )
    classifier = layers(
        *(nn.Dropout(), nn.Linear(256 * 36, hidden), nn.ReLU()),
        *(nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU()),
        nn.Linear(hidden, num_classes),
    )
    return torch_dense_net(features, 6, classifier)


def torch_vgg(depth, batch_norm, width, hidden, num_classes):
    nn, modules, before = torch.nn, [], 3
    for layer in VGG_LAYERS[depth].split():
        if layer == "M":
            modules.append(nn.MaxPool2d(2, 2))
            continue
        after = int(layer) * width // 64
        modules.append(nn.Conv2d(before, after, 3, padding=1))
        modules += [nn.BatchNorm2d(after)] * batch_norm + [nn.ReLU()]
        before = after
    if hidden is None:
        return torch_dense_net(layers(*modules), 1, nn.Linear(before, num_classes))
    classifier = layers(
        *(nn.Linear(before * 49, hidden), nn.ReLU(), nn.Dropout()),
        *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout()),
        nn.Linear(hidden, num_classes),
    )
    return torch_dense_net(layers(*modules), 7, classifier)


def torch_googlenet(num_classes, heads):
    nn, functional = torch.nn, torch.nn.functional

    class Basic(nn.Module):
        def __init__(self, channels, features, kernel, stride=1):
            super().__init__()
            pad = kernel // 2
            self.conv = nn.Conv2d(channels, features, kernel, stride, pad, bias=False)
            self.bn = nn.BatchNorm2d(features, eps=0.001)

        def forward(self, x):
            return functional.relu(self.bn(self.conv(x)))

    class Inception(nn.Module):
        def __init__(self, n, b1, r3, b3, r5, b5, pool):
            super().__init__()
            self.branch1 = Basic(n, b1, 1)
            self.branch2 = layers(Basic(n, r3, 1), Basic(r3, b3, 3))
            self.branch3 = layers(Basic(n, r5, 1), Basic(r5, b5, 3))
            pooling = nn.MaxPool2d(3, 1, padding=1, ceil_mode=True)
            self.branch4 = layers(pooling, Basic(n, pool, 1))

        def forward(self, x):
            branches = (self.branch1, self.branch2, self.branch3, self.branch4)
            return torch.cat([branch(x) for branch in branches], 1)

    class Head(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = Basic(channels, 128, 1)
            self.fc1, self.fc2 = nn.Linear(2048, 1024), nn.Linear(1024, num_classes)

        def forward(self, x):
            x = self.conv(functional.adaptive_avg_pool2d(x, (4, 4))).flatten(1)
            return self.fc2(functional.relu(self.fc1(x)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = Basic(3, 64, 7, 2)
            self.conv2, self.conv3 = Basic(64, 64, 1), Basic(64, 192, 3)
            for name, shape in INCEPTIONS.items():
                self.add_module(f"inception{name}", Inception(*shape))
            if heads:
                self.aux1, self.aux2 = Head(512), Head(528)
            self.fc = nn.Linear(1024, num_classes)

        def forward(self, x):
            def pool(x, size):
                return functional.max_pool2d(x, size, 2, ceil_mode=True)

            x = self.conv3(self.conv2(pool(self.conv1(x), 3)))
            x, others = pool(x, 3), []
            for name in INCEPTIONS:
                x = pool(x, 3 if name == "4a" else 2) if name in ("4a", "5a") else x
                x = getattr(self, f"inception{name}")(x)
                if heads and self.training and name in ("4a", "4d"):
                    others.append(getattr(self, f"aux{len(others) + 1}")(x))
            logits = self.fc(x.mean((2, 3)))
            return (logits, *others) if others else logits

    return Net()


def randomize(net, side, seed=0):
    """He-normal kernels, random scales and biases, averages of a random batch."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, deviation):
        return torch.randn(shape, generator=generator) * deviation

    for name, value in net.named_parameters():
        if value.ndim > 1:
            value.data = normal(value.shape, (2 / value[0].numel()) ** 0.5)
        elif name.endswith("weight"):
            value.data = 0.75 + torch.rand(value.shape, generator=generator) / 2
        else:
            value.data = normal(value.shape, 0.1)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5
        if hasattr(module, "count"):  # a residual block: 50 of them should not explode
            getattr(module, f"bn{module.count}").weight.data *= 0.3
    with torch.no_grad():
        net.train()(normal((4, 3, side, side), 1.0))
    return net.eval()
