"""Weights of PyTorch's nets, drawn at random: the same logits both ways.

All but refusals is skipped without PyTorch.
"""

import jax
import numpy as np
import pytest
from torch_nets import (
    randomize,
    torch_alexnet,
    torch_cifar,
    torch_googlenet,
    torch_resnet,
    torch_vgg,
)

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


# How it is made, our network and its fields, the side of the images.
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

LONG = ("googlenet", "cifar56 B", "resnet34, small stem", "resnet152")  # slow

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


def random_net(form, path):
    """A net of PyTorch's with random weights; ours, imported; images, and its logits."""
    create, (name, fields), side = form
    net = randomize(create(), side)
    model, variables = import_file(net, path, name, fields, side)
    images = random_images(2, side)
    return net, model, variables, images, apply_model(variables, images, model=model)


def import_file(net, path, model_name, fields, side):
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, path)
    tensors = load_tensors(path)
    num_classes = [len(a) for name, a in tensors.items() if name.endswith("bias")][-1]
    fields = interop.infer_fields(model_name, tensors) | fields
    model = create_model(model_name, num_classes, **fields)
    return model, interop.convert(tensors, model, (side, side, 3))


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
@pytest.mark.parametrize(
    "case", [pytest.param(net, marks=[pytest.mark.slow] * (net in LONG)) for net in NETS]
)
def test_same_logits_as_pytorch(case, tmp_path):
    """Of what was imported, and of what is exported again into a new module."""
    net, model, variables, images, ours = random_net(NETS[case], tmp_path / "net.pth")
    check_logits(ours, torch_logits(net, images), case)
    exported = load_exported(NETS[case][0](), model, variables)
    check_logits(ours, torch_logits(exported, images), f"{case}, exported")


@needs_torch
@pytest.mark.parametrize("case", OTHER_FORMS)
def test_other_forms_are_exported_as_pytorchs(case, tmp_path):
    form = OTHER_FORMS[case]
    net, model, variables, images, ours = random_net(form, tmp_path / "net.pth")
    # The tensors as they are would be another function.
    assert np.abs(ours - torch_logits(net, images)).max() > 0.01
    exported = load_exported(form[0](), model, variables)
    check_logits(ours, torch_logits(exported, images), case)
    written, tensors = to_torch(model, variables)
    again = interop.convert(tensors, written, images.shape[1:])
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
