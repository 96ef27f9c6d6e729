"""Weights of PyTorch's nets: written down again, the same logits both ways.

The names are those of torchvision (as of 0.20) and of akamaster/pytorch_resnet_cifar10, the
weights and averages are drawn at random. All but refusals is skipped without PyTorch.
"""

import subprocess
import sys

import jax
import numpy as np
import pytest
from test_interop_names import BLOCKS, INCEPTIONS, VGG_LAYERS

from cvjax.errors import UserError
from cvjax.interop import torch as interop
from cvjax.interop.tensors import load_tensors
from cvjax.interop.torch_export import to_torch
from cvjax.models import create_model
from cvjax.training.trained_network import apply_model

try:
    import torch
except ModuleNotFoundError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="needs PyTorch: pip install torch")


TOLERANCE = 1e-5  # of the largest of the logits, float32


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


NETS = {
    "cifar20": (
        lambda: torch_cifar(20, 16, 10),
        ("resnet_cifar", {"depth": 20, "pad_channels": "both"}),
        32,
    ),
    "cifar56 B": (
        lambda: torch_cifar(56, 4, 10, "B"),
        ("resnet_cifar", {"depth": 56, "width": 4, "shortcut": "B", "loop": "rolled"}),
        16,
    ),
    "alexnet": (lambda: torch_alexnet(64, 7), ("alexnet", {"hidden": 64}), 224),
    "alexnet, averaged": (lambda: torch_alexnet(64, 7), ("alexnet", {"hidden": 64}), 100),
    "vgg11": (
        lambda: torch_vgg(11, False, 8, 32, 7),
        ("vgg", {"depth": 11, "width": 8, "hidden": 32}),
        224,
    ),
    "vgg16_bn": (
        lambda: torch_vgg(16, True, 8, 32, 7),
        ("vgg", {"depth": 16, "width": 8, "hidden": 32}),
        64,
    ),
    "vgg19, small head": (
        lambda: torch_vgg(19, True, 16, None, 7),
        ("vgg", {"depth": 19, "width": 16}),
        32,
    ),
    "googlenet": (lambda: torch_googlenet(7, False), ("googlenet", {}), 96),
    "googlenet, heads": (lambda: torch_googlenet(7, True), ("googlenet", {}), 100),
    "resnet18": (
        lambda: torch_resnet(18, 16, 7),
        ("resnet", {"depth": 18, "width": 16}),
        64,
    ),
    "resnet34, small stem": (
        lambda: torch_resnet(34, 8, 7, "small"),
        ("resnet", {"depth": 34, "width": 8, "stem": "small", "version": "1"}),
        32,
    ),
    "resnet50": (
        lambda: torch_resnet(50, 16, 7),
        ("resnet", {"depth": 50, "width": 16}),
        64,
    ),
    "resnet152": (
        lambda: torch_resnet(152, 4, 7),
        ("resnet", {"depth": 152, "width": 4, "loop": "rolled"}),
        64,
    ),
}


def import_file(net, path, model_name, fields, side):
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, path)
    tensors = load_tensors(path)
    num_classes = [len(a) for name, a in tensors.items() if name.endswith("bias")][-1]
    fields = interop.infer_fields(model_name, tensors) | fields
    model = create_model(model_name, num_classes, **fields)
    return model, interop.convert(tensors, model, (side, side, 3))


# Forms that PyTorch's modules have not, but can compute with other parameters.
OTHER_FORMS = {
    "padded at the end": (
        lambda: torch_cifar(20, 16, 10),
        ("resnet_cifar", {"depth": 20}),
        32,
    ),
    "smaller steps": (
        lambda: torch_cifar(26, 4, 10, blocks=(6, 3, 3)),
        (
            "resnet_cifar",
            {"depth": 26, "blocks": (6, 3, 3), "width": 4, "step_size": 0.5},
        ),
        16,
    ),
    "smaller steps, B": (
        lambda: torch_cifar(14, 4, 10, "B"),
        ("resnet_cifar", {"depth": 14, "width": 4, "shortcut": "B", "step_size": 0.3}),
        16,
    ),
}


def random_images(count, side):
    return np.random.default_rng(1).normal(size=(count, side, side, 3)).astype(np.float32)


def torch_logits(net, images):
    with torch.no_grad():
        return net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def load_exported(net, model, variables):
    _, tensors = to_torch(model, variables)
    net.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()}, strict=True)
    return net.eval()


def check_logits(actual, expected, what, tolerance=TOLERANCE):
    scale, difference = np.abs(expected).max(), np.abs(actual - expected).max()
    print(f"{what}: max difference {difference / scale:.1e} of the logits' {scale:.2f}")
    assert np.abs(expected[0] - expected[1]).max() > 0.1  # they do depend on the images
    assert difference < tolerance * scale


@needs_torch
@pytest.mark.parametrize("case", NETS)
def test_same_logits_as_pytorch(case, tmp_path):
    """Of what was imported, and of what is exported again into a new module."""
    create, (name, fields), side = NETS[case]
    net = randomize(create(), side)
    model, variables = import_file(net, tmp_path / "net.pth", name, fields, side)
    images = random_images(2, side)
    ours = apply_model(variables, images, model=model)
    check_logits(ours, torch_logits(net, images), case)
    exported = load_exported(create(), model, variables)
    check_logits(ours, torch_logits(exported, images), f"{case}, exported")


@needs_torch
@pytest.mark.parametrize("case", OTHER_FORMS)
def test_other_forms_are_exported_as_pytorchs(case, tmp_path):
    create, (name, fields), side = OTHER_FORMS[case]
    net = randomize(create(), side)
    model, variables = import_file(net, tmp_path / "net.pth", name, fields, side)
    images = random_images(2, side)
    ours = apply_model(variables, images, model=model)
    # The tensors as they are would be another function.
    assert np.abs(ours - torch_logits(net, images)).max() > 0.01
    exported = load_exported(create(), model, variables)
    check_logits(ours, torch_logits(exported, images), case)
    written, tensors = to_torch(model, variables)
    again = interop.convert(tensors, written, (side, side, 3))
    check_logits(apply_model(again, images, model=written), ours, f"{case}, read again")


REFUSED = {
    "plain": ("resnet_cifar", {"shortcut": "none"}, "this is a plain net"),
    "C": ("resnet_cifar", {"shortcut": "C"}, "no projections"),
    "odd": ("resnet_cifar", {"width": 3}, "by halves, which width 3"),
    "plain, large": ("resnet", {"depth": 18, "shortcut": "none"}, "this is a plain net"),
    "A, large": ("resnet", {"depth": 18, "shortcut": "A"}, "shortcut B, and this net A"),
    "strides": ("resnet", {"depth": 50, "version": "1"}, "version 1.5, and this net"),
    "5x5": ("googlenet", {"batch_norm": True}, "variant 3x3, and this net is 5x5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_forms_that_pytorch_cannot_compute(case):
    name, fields, reason = REFUSED[case]
    with pytest.raises(UserError, match=reason) as caught:
        to_torch(create_model(name, 10, **fields), {"params": {}})
    assert str(caught.value).count(". ") == 0  # one sentence


@needs_torch
@pytest.mark.parametrize("case", NETS)
def test_pytorch_gets_back_what_was_imported(case, tmp_path):
    create, (name, fields), side = NETS[case]
    net = create()
    with torch.no_grad():
        for number, tensor in enumerate(net.state_dict().values(), start=1):
            if tensor.is_floating_point():  # all values of all tensors differ
                tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + number / 512)
    model, variables = import_file(net, tmp_path / "net.pth", name, fields, side)
    fresh = load_exported(create(), model, variables)
    expected = net.state_dict()
    for key, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


@needs_torch
def test_auxiliary_heads_as_in_pytorch(tmp_path):
    net = randomize(torch_googlenet(7, True), 96)
    fields = {"dropout": 0.0, "auxiliary_dropout": 0.0}
    model, variables = import_file(net, tmp_path / "net.pth", "googlenet", fields, 96)
    images = random_images(4, 96)
    with torch.no_grad():
        channels_first = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        expected = [logits.numpy() for logits in net.train()(channels_first)]

    @jax.jit
    def apply(variables, images):
        return model.apply(
            variables, images, train=True, mutable=["auxiliary", "batch_stats"]
        )

    logits, updated = apply(variables, images)
    heads = updated["auxiliary"]
    actual = [logits, *jax.tree.leaves(heads["4a"]), *jax.tree.leaves(heads["4d"])]
    # Statistics of 4 images of 3x3 pixels: PyTorch's own float32 is off by as much as ours.
    for ours, theirs in zip(actual, expected, strict=True):
        check_logits(ours, theirs, "googlenet in training, with heads", 1e-4)


@needs_torch
def test_padding_at_the_end_is_another_function(tmp_path):
    net = randomize(torch_cifar(8, 4, 10), 16)
    images = random_images(2, 16)
    logits = []
    for pads in ("end", "both"):
        fields = {"depth": 8, "width": 4, "pad_channels": pads}
        model, variables = import_file(
            net, tmp_path / "net.pth", "resnet_cifar", fields, 16
        )
        logits.append(apply_model(variables, images, model=model))
    assert np.abs(logits[0] - logits[1]).max() > 0.01


@needs_torch
def test_file_formats_agree(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    net = torch_cifar(8, 4, 10)
    state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save(net.state_dict(), tmp_path / "bare.pt")
    torch.save({"state_dict": state, "best": torch.tensor(0.9)}, tmp_path / "nested.th")
    save_file(state, tmp_path / "net.safetensors")
    expected = {
        name: tensor.numpy()
        for name, tensor in net.state_dict().items()
        if "num_batches" not in name
    }
    for name in ("bare.pt", "nested.th", "net.safetensors"):
        tensors = load_tensors(tmp_path / name)
        assert tensors.keys() == expected.keys()
        assert all((tensors[key] == expected[key]).all() for key in expected)


@needs_torch
def test_files_without_a_state_dict(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match="holds no state dict"):
        load_tensors(tmp_path / "epoch.pt")
    for name in ("whole.pt", "junk.pt"):
        with pytest.raises(UserError, match="cannot be read as a file of tensors"):
            load_tensors(tmp_path / name)


def test_more_classes_than_there_are(tmp_path):
    arguments = ["x.npz", "--model=mlp", "--image_size=8", "--normalization=none"]
    arguments += ["--num_classes=2000000000", f"--workdir={tmp_path / 'w'}"]
    done = subprocess.run(
        [sys.executable, "-m", "cvjax.interop.torch", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "is more than 1,000,000" in done.stderr
