"""Preparing CIFAR and MNIST end to end, from tiny archives of the official layout."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import tarfile
import textwrap
import threading

import numpy as np
import pytest

from cvjax.data import download
from cvjax.data.download import Archive
from cvjax.data.prepare import PREPARABLE, prepare
from cvjax.errors import UserError

# The attribute `prepare` of cvjax.data is the function.
module = sys.modules["cvjax.data.prepare"]

VERSIONS = {"cifar10": "3.0.2", "cifar100": "3.0.2", "mnist": "3.0.1"}
COUNTS = {"train": 20, "test": 7}
LABELS = {
    "cifar10": {"label": 10},
    "cifar100": {"coarse_label": 20, "label": 100},
    "mnist": {"label": 10},
}
CLASS_NAMES = {
    f"{name}.{feature}": [f"{feature} {index}" for index in range(count)]
    for name in ("cifar10", "cifar100")
    for feature, count in LABELS[name].items()
}


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """A folder, and the URL at which its files are served."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def no_server():
    """An URL at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: refused, and not reused
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("CVJAX_MIRROR", raising=False)
    # So that what `write_archives` records is undone.
    for name, archives in PREPARABLE.items():
        monkeypatch.setitem(PREPARABLE, name, archives)


def draw(name):
    """For each split its images and its labels by feature."""
    rng = np.random.default_rng(0)
    shape = (28, 28, 1) if name == "mnist" else (32, 32, 3)
    return {
        split: (
            rng.integers(256, size=(count, *shape), dtype=np.uint8),
            {
                feature: rng.integers(classes, size=count, dtype=np.uint8)
                for feature, classes in LABELS[name].items()
            },
        )
        for split, count in COUNTS.items()
    }


def write_archives(name, data, folder, class_names=CLASS_NAMES):
    """Writes `data` as the official archives and records their sizes and digests."""
    if name == "mnist":
        write_mnist(data, folder)
    else:
        write_cifar(name, data, folder, class_names)
    PREPARABLE[name] = tuple(
        Archive(archive.url, len(content), hashlib.sha256(content).hexdigest())
        for archive in PREPARABLE[name]
        for content in [(folder / archive.file_name).read_bytes()]
    )


def write_mnist(data, folder):
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = data[split]
        for kind, magic, array in (
            ("images-idx3", 2051, images[..., 0]),
            ("labels-idx1", 2049, labels["label"]),
        ):
            header = np.array([magic, *array.shape], ">u4").tobytes()
            file = folder / f"{prefix}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(header + array.tobytes()))


def write_cifar(name, data, folder, class_names):
    if name == "cifar10":
        prefix, archive = "cifar-10-batches-bin", "cifar-10-binary.tar.gz"
        files = {"train": [f"data_batch_{n}.bin" for n in range(1, 6)]}
        files["test"] = ["test_batch.bin"]
        names = {"batches.meta.txt": class_names["cifar10.label"]}
    else:
        prefix, archive = "cifar-100-binary", "cifar-100-binary.tar.gz"
        files = {"train": ["train.bin"], "test": ["test.bin"]}
        names = {
            "fine_label_names.txt": class_names["cifar100.label"],
            "coarse_label_names.txt": class_names["cifar100.coarse_label"],
        }
    members = {file: ("\n".join(lines) + "\n\n").encode() for file, lines in names.items()}
    for split, (images, labels) in data.items():
        pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        # The labels are drawn in the order of the file: coarse, then fine.
        columns = [column[:, None] for column in labels.values()]
        records = np.concatenate([*columns, pixels], axis=1)
        for file, part in zip(
            files[split], np.array_split(records, len(files[split])), strict=True
        ):
            members[file] = part.tobytes()
    with tarfile.open(folder / archive, "w:gz") as tar:
        for file, content in members.items():
            member = tarfile.TarInfo(f"{prefix}/{file}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def hash_order(split, count):
    """Where TFDS's hashing puts the examples: the keys in the order of the records."""
    return sorted(
        range(count),
        key=lambda key: int(hashlib.md5(f"{split}{key}".encode()).hexdigest(), 16),
    )


def check_prepared(name, data, data_dir):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(data_dir / name / VERSIONS[name])
    assert builder.name == name
    assert set(builder.info.splits) == set(data)
    for split, (images, labels) in data.items():
        examples = list(builder.as_data_source(split=split))
        order = hash_order(split, len(images))
        assert len(examples) == len(order)
        for example, key in zip(examples, order, strict=True):
            np.testing.assert_array_equal(example["image"], images[key])
            for feature, column in labels.items():
                assert example[feature] == column[key]
            if name != "mnist":
                assert example["id"] == f"{split}_{key:05d}".encode()
    return builder


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def version_folders(data_dir):
    return [path for path in data_dir.glob("*/*") if path.name[0].isdigit()]


def test_records_are_those_of_tfds():
    import tensorflow_datasets as tfds

    checksums = pathlib.Path(tfds.__file__).parent / "url_checksums"
    for name, archives in PREPARABLE.items():
        lines = (checksums / f"{name}.txt").read_text().splitlines()
        expected = {tuple(line.split()[:3]) for line in lines}
        assert {(a.url, str(a.size), a.sha256) for a in archives} == expected


@pytest.mark.parametrize("name", PREPARABLE)
def test_download_and_prepare(name, served, tmp_path, capsys):
    folder, url = served
    data = draw(name)
    write_archives(name, data, folder)
    prepare(name, tmp_path / "data", mirror=url + "/")
    builder = check_prepared(name, data, tmp_path / "data")
    assert builder.info.file_format.value == "array_record"
    for feature in LABELS[name]:
        names = CLASS_NAMES.get(f"{name}.{feature}", [str(digit) for digit in range(10)])
        assert builder.info.features[feature].names == names
    info = json.loads((builder.data_path / "dataset_info.json").read_text())
    assert info["name"] == name
    family = name.rstrip("0123456789")
    assert info["moduleName"] == f"tensorflow_datasets.image_classification.{family}"
    assert int(info["downloadSize"]) == sum(archive.size for archive in PREPARABLE[name])
    kept = {path.name for path in (tmp_path / "data/downloads/cvjax").iterdir()}
    assert kept == {f"{name}.lock", *(archive.file_name for archive in PREPARABLE[name])}
    assert capsys.readouterr().out == ""


def test_nothing_is_done_twice(served, tmp_path, monkeypatch):
    folder, url = served
    write_archives("mnist", draw("mnist"), folder)
    monkeypatch.setenv("CVJAX_MIRROR", url)
    prepare("mnist", tmp_path)
    before = times(tmp_path / "mnist/3.0.1")
    for file in (tmp_path / "downloads/cvjax").glob("*.gz"):
        file.unlink()
    monkeypatch.setattr(download, "_download", None)
    prepare("mnist", tmp_path)
    assert times(tmp_path / "mnist/3.0.1") == before


def test_archive_put_there_by_hand(no_server, tmp_path):
    folder = tmp_path / "downloads/cvjax"
    folder.mkdir(parents=True)
    data = draw("cifar100")
    write_archives("cifar100", data, folder)
    prepare("cifar100", tmp_path, mirror=no_server)
    check_prepared("cifar100", data, tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "longer", "changed"])
@pytest.mark.parametrize("by_hand", [False, True], ids=["downloaded", "by hand"])
def test_bad_archive(damage, by_hand, served, tmp_path):
    served_folder, url = served
    folder = tmp_path / "downloads/cvjax"
    folder.mkdir(parents=True)
    archive_folder = folder if by_hand else served_folder
    data = draw("cifar10")
    write_archives("cifar10", data, archive_folder)
    file = archive_folder / "cifar-10-binary.tar.gz"
    good = file.read_bytes()
    bad = {
        "truncated": good[:-100],
        "longer": good + b"0",
        "changed": good[:-1] + bytes([good[-1] ^ 1]),
    }[damage]
    file.write_bytes(bad)
    with pytest.raises(UserError) as caught:
        prepare("cifar10", tmp_path, mirror=url)
    message = str(caught.value)
    assert str(folder / file.name) in message
    if damage == "changed":
        assert hashlib.sha256(bad).hexdigest() in message
        assert f"instead of {hashlib.sha256(good).hexdigest()}" in message
    else:
        assert f" {len(bad):,} bytes instead of {len(good):,};" in message
    # What the user put there stays, what was downloaded does not.
    assert sorted(path.name for path in folder.iterdir()) == (
        [file.name, "cifar10.lock"] if by_hand else ["cifar10.lock"]
    )
    assert version_folders(tmp_path) == []
    file.write_bytes(good)
    prepare("cifar10", tmp_path, mirror=url)
    check_prepared("cifar10", data, tmp_path)


def test_no_such_file_on_the_server(served, tmp_path):
    with pytest.raises(UserError, match=r"HTTP Error 404") as caught:
        prepare("mnist", tmp_path, mirror=served[1])
    archive = PREPARABLE["mnist"][0]
    folder = tmp_path / "downloads/cvjax"
    for part in (
        f"{served[1]}/{archive.file_name}",
        "9,912,422 bytes",
        archive.sha256,
        str(folder / archive.file_name),
    ):
        assert part in str(caught.value)
    assert [path.name for path in folder.iterdir()] == ["mnist.lock"]


def test_no_server(no_server, tmp_path):
    with pytest.raises(UserError, match=r"cannot be downloaded \(.*refused\); try"):
        prepare("mnist", tmp_path, mirror=no_server)


def test_silent_server(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=r"cannot be downloaded \(timed out\)"):
            prepare("mnist", tmp_path, mirror=url)


def test_mirror_that_is_no_url(tmp_path):
    with pytest.raises(UserError, match="unknown url type"):
        prepare("mnist", tmp_path, mirror="mirror.example.org")


def test_unknown_name(tmp_path):
    with pytest.raises(UserError, match="choose one of cifar10, cifar100, mnist"):
        prepare("svhn", tmp_path)


def test_data_dir_that_cannot_be_written_to(tmp_path):
    (tmp_path / "downloads").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="mnist cannot be prepared in"):
        prepare("mnist", tmp_path)


def test_folder_without_a_data_set_is_not_taken_as_good(tmp_path):
    (tmp_path / "mnist/3.0.1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"mnist/3\.0\.1 exists but holds no prepared"):
        prepare("mnist", tmp_path)


def test_interrupted(served, tmp_path, monkeypatch):
    folder, url = served
    data = draw("mnist")
    write_archives("mnist", data, folder)

    def interrupt(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_encode", interrupt)
        prepare("mnist", tmp_path, mirror=url)
    assert list((tmp_path / "mnist").iterdir()) == []
    prepare("mnist", tmp_path, mirror=url)
    check_prepared("mnist", data, tmp_path)


def start(tmp_path, url, code=""):
    """Prepares mnist in a new process, after running `code`."""
    (tmp_path / "recorded").write_bytes(pickle.dumps(PREPARABLE["mnist"]))
    program = f"""
        import os, pathlib, pickle, sys, time
        from cvjax.data.prepare import PREPARABLE, prepare
        assert "tensorflow_datasets" not in sys.modules
        module = sys.modules["cvjax.data.prepare"]
        folder = pathlib.Path({str(tmp_path)!r})
        PREPARABLE["mnist"] = pickle.loads((folder / "recorded").read_bytes())
        {code}
        prepare("mnist", folder, mirror={url!r})
        assert "tensorflow_datasets" in sys.modules
        assert "tensorflow" not in sys.modules
        """
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_and_then_two_at_once(served, tmp_path):
    folder, url = served
    data = draw("mnist")
    write_archives("mnist", data, folder)
    killed = start(tmp_path, url, "module._encode = lambda _: os.kill(os.getpid(), 9)")
    _, log = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL, log
    assert version_folders(tmp_path) == []
    # Slow enough for the second to start while the first is at work.
    slow = (
        "fast = module._encode; module._encode = lambda x: (time.sleep(0.05), fast(x))[1]"
    )
    both = [start(tmp_path, url, slow) for _ in range(2)]
    for process in both:
        _, log = process.communicate(timeout=60)
        assert process.returncode == 0, log
    check_prepared("mnist", data, tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_as_the_real_set(name, tfds_dir, tmp_path):
    """Features, versions and class names as TFDS wrote them; real images survive."""
    import tensorflow_datasets as tfds

    if not (tfds_dir / name / VERSIONS[name]).is_dir():
        pytest.skip(f"needs {name} {VERSIONS[name]}")
    real = tfds.builder_from_directory(tfds_dir / name / VERSIONS[name])
    examples = {
        split: real.as_data_source(split=split).__getitems__(list(range(12)))
        for split in ("train", "test")
    }
    data = {
        split: (
            np.stack([example["image"] for example in rows]),
            {"label": np.array([example["label"] for example in rows], np.uint8)},
        )
        for split, rows in examples.items()
    }
    folder = tmp_path / "downloads/cvjax"
    folder.mkdir(parents=True)
    names = {"cifar10.label": real.info.features["label"].names}
    write_archives(name, data, folder, names)
    prepare(name, tmp_path)
    made = check_prepared(name, data, tmp_path)
    for path in real.data_path.iterdir():
        if path.name == "features.json" or path.suffix == ".txt":
            assert (made.data_path / path.name).read_text() == path.read_text()
    infos = [
        json.loads((builder.data_path / "dataset_info.json").read_text())
        for builder in (made, real)
    ]
    for info in infos:
        info.pop("downloadSize", None)
        info.pop("splits")
    assert infos[0] == infos[1]
    if name == "cifar10":
        for split, rows in examples.items():
            order = hash_order(split, real.info.splits[split].num_examples)
            expected = [f"{split}_{key:05d}".encode() for key in order[: len(rows)]]
            assert [example["id"] for example in rows] == expected
