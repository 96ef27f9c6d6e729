"""Loading by name: from prepared sets that the tests write, and from real ones."""

import gzip
import hashlib
import io
import json
import pathlib
import shutil
import struct
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from cvjax import data
from cvjax.data.prepare import PREPARABLE, Archive
from cvjax.errors import UserError

reader = sys.modules["cvjax.data.tfds"]

CLASSES = ["square", "circle", "cross"]
SIZES = {"train": 60, "test": 9}


def draw(sizes=SIZES, shape=(4, 5, 3), seed=0):
    """For each split random images and labels, equally many of each class."""
    rng = np.random.default_rng(seed)
    return {
        split: (
            rng.integers(0, 256, (count, *shape), dtype=np.uint8),
            rng.permutation(np.arange(count) % len(CLASSES)),
        )
        for split, count in sizes.items()
    }


def png(image, level=6):
    file = io.BytesIO()
    PIL.Image.fromarray(image.squeeze()).save(file, "png", compress_level=level)
    return file.getvalue()


def write(
    folder,
    splits,
    *,
    shape=(4, 5, 3),
    dtype=np.uint8,
    keys=("image", "label"),
    encode=png,
    config="",
):
    """Writes a prepared set named "shapes" with TFDS, and gives its folder."""

    class Shapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "shapes"
        VERSION = tfds.core.Version("1.2.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []
        pkg_dir_path = folder  # where TFDS looks for texts that describe the set

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=shape, dtype=dtype),
                "label": tfds.features.ClassLabel(names=CLASSES),
                "weight": np.uint8,
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=keys,
            )

        def _split_generators(self, _):
            return {name: self._generate_examples(*s) for name, s in splits.items()}

        def _generate_examples(self, images, labels):
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield i, {"image": encode(image), "label": label, "weight": 1}

    builder = Shapes(data_dir=folder, file_format="array_record", config=config or None)
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`data.load` with folders of its own, in a home of its own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    for name in ("TFDS_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    # Nothing listens at the port 9 of this machine: no test reaches a real server.
    monkeypatch.setenv("CVJAX_MIRROR", "http://127.0.0.1:9")
    (tmp_path / "data").mkdir()

    def load(name="shapes", **options):
        options.setdefault("data_dir", str(tmp_path / "data"))
        return data.load(name, cache_dir=str(tmp_path / "cache"), **options)

    return load


def rows(images, labels):
    return sorted(
        image.tobytes() + bytes([label])
        for image, label in zip(images, labels, strict=True)
    )


def split_rows(*splits):
    return sorted(row for split in splits for row in rows(split.images, split.labels))


def assert_equal(first, second):
    for name in ("train", "val", "test"):
        a, b = getattr(first, name), getattr(second, name)
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)
    assert first.class_names == second.class_names
    assert first.fingerprint == second.fingerprint


def test_importing_is_light():
    heavy = ["tensorflow", "tensorflow_datasets", "sklearn", "jax"]
    program = f"import cvjax.data, sys; assert not {{*{heavy}}} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_digits_are_there_at_once():
    heavy = ["sklearn", "scipy"]  # more than a second
    program = (
        "import cvjax.data, cvjax.training, sys; cvjax.data.load('digits'); "
        f"found = {{*{heavy}}} & {{*sys.modules}}; assert not found, found"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_reads_what_was_written(load, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK", 7)  # several, the last one smaller
    splits = draw()
    write(tmp_path / "data", splits)
    dataset = load()
    assert split_rows(dataset.train, dataset.val) == rows(*splits["train"])
    assert split_rows(dataset.test) == rows(*splits["test"])
    for split in (dataset.train, dataset.val, dataset.test):
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
    assert dataset.class_names == tuple(CLASSES)
    assert (dataset.name, dataset.image_shape) == ("shapes", (4, 5, 3))
    assert "tensorflow" not in sys.modules


def test_one_channel(load, tmp_path):
    splits = draw(shape=(4, 5, 1))
    write(tmp_path / "data", splits, shape=(4, 5, 1))
    dataset = load()
    assert dataset.image_shape == (4, 5, 1)
    assert split_rows(dataset.test) == rows(*splits["test"])


def test_validation_is_a_stratified_tenth_of_training(load, tmp_path):
    write(tmp_path / "data", draw())
    dataset = load()
    assert np.bincount(dataset.val.labels).tolist() == [2, 2, 2]
    assert np.bincount(dataset.train.labels).tolist() == [18, 18, 18]
    larger = load(val_examples=12)
    assert np.bincount(larger.val.labels).tolist() == [4, 4, 4]
    assert len(larger.train.labels) == 48
    assert larger.fingerprint != dataset.fingerprint


@pytest.mark.parametrize("count", [0, -2, 60])
def test_impossible_validation_sizes(count, load, tmp_path):
    write(tmp_path / "data", draw())
    with pytest.raises(UserError, match=rf"between 1 and 59 .*, got {count}\."):
        load(val_examples=count)


def test_second_load_does_not_decode(load, tmp_path, monkeypatch):
    write(tmp_path / "data", draw())
    first = load()
    monkeypatch.setattr(reader, "decode", None)
    assert_equal(load(), first)


def test_changed_source_is_decoded_again(load, tmp_path):
    folder = write(tmp_path / "data", draw())
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    first = load()
    folder.rename(tmp_path / "old")
    splits = draw(seed=1)
    write(tmp_path / "data", splits)
    assert {file.name: file.stat().st_size for file in folder.iterdir()} == sizes
    second = load()
    assert split_rows(second.test) == rows(*splits["test"])
    assert second.fingerprint != first.fingerprint


def test_fingerprint_is_of_the_pixels_not_of_the_files(load, tmp_path):
    changed = draw()
    changed["test"][0][4, 0, 0, 0] ^= 1  # one pixel, and no label
    write(tmp_path / "a", draw())
    write(tmp_path / "b", draw(), encode=lambda image: png(image, level=0))
    write(tmp_path / "c", changed)
    a, b, c = (load(data_dir=str(tmp_path / name)) for name in "abc")
    assert_equal(a, b)
    assert c.fingerprint != a.fingerprint


def test_source_that_is_gone(load, tmp_path, caplog):
    folder = write(tmp_path / "data", draw())
    first = load()
    folder.parent.rename(tmp_path / "elsewhere")
    caplog.set_level("INFO")
    assert_equal(load(), first)
    assert f"shapes is not in {tmp_path / 'data'}; its images come from" in caplog.text
    assert "unchecked" in caplog.text


def test_where_prepared_sets_are_looked_for(load, tmp_path, monkeypatch):
    places = ("home/tensorflow_datasets", "environment", "argument")
    fingerprints = {}
    for seed, place in enumerate(places):
        write(tmp_path / place, draw(seed=seed))
        path = str(tmp_path / place)
        fingerprints[place] = load(data_dir=path).fingerprint
    default, environment, argument = places
    assert load(data_dir="").fingerprint == fingerprints[default]
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / environment))
    assert load(data_dir="").fingerprint == fingerprints[environment]
    path = str(tmp_path / argument)
    assert load(data_dir=path).fingerprint == fingerprints[argument]


def test_version_and_config(load, tmp_path):
    splits = draw()
    write(tmp_path / "data", splits, config="blue")
    for name in ("shapes/blue", "shapes/blue:1.2.0"):
        dataset = load(name)
        assert split_rows(dataset.test) == rows(*splits["test"])
        assert dataset.name == "shapes/blue"
    with pytest.raises(UserError, match=r"config\.data\.name=shapes/blue "):
        load("shapes")
    with pytest.raises(UserError, match=r"holds version 1\.2\.0 .*, not 2\.0\.0\."):
        load("shapes/blue:2.0.0")


def test_newest_version_is_taken(load, tmp_path):
    newest = draw(seed=1)
    write(tmp_path / "data", newest).rename(tmp_path / "data/shapes/1.10.0")
    write(tmp_path / "data", draw())
    # What an interrupted preparation of TFDS leaves is no version.
    info = tmp_path / "data/shapes/1.10.0/dataset_info.json"
    (tmp_path / "data/shapes/incomplete.X_2.0.0").mkdir()
    shutil.copy(info, tmp_path / "data/shapes/incomplete.X_2.0.0")
    info.write_text(info.read_text().replace('"1.2.0"', '"1.10.0"'))
    assert split_rows(load().test) == rows(*newest["test"])


def test_validation_serves_as_test(load, tmp_path):
    splits = draw({"train": 60, "validation": 9})
    write(tmp_path / "data", splits)
    dataset = load()
    assert split_rows(dataset.test) == rows(*splits["validation"])
    assert len(dataset.val.labels) == 6


def test_a_split_without_labels_is_left_out(load, tmp_path, caplog):
    splits = draw({"train": 30, "validation": 6, "test": 9})
    splits["test"] = splits["test"][0], np.full(9, -1)
    write(tmp_path / "data", splits)
    with caplog.at_level("INFO"):
        dataset = load()
    assert split_rows(dataset.test) == rows(*splits["validation"])
    assert "test" in caplog.text and "label" in caplog.text


def test_labels_that_are_partly_kept_back(load, tmp_path):
    splits = draw()
    splits["test"][1][4:] = -1
    write(tmp_path / "data", splits)
    with pytest.raises(UserError, match=r"5 .*labels|labels.* 5"):
        load()


def test_no_test_split(load, tmp_path):
    write(tmp_path / "data", draw({"train": 60}))
    with pytest.raises(UserError, match=r"^shapes has the splits train; it takes"):
        load()


@pytest.mark.parametrize(
    "keys",
    [
        None,
        ("image", "weight"),
        ("weight", "label"),
        ("image", "label", "weight"),
        (("image", "weight"), "label"),
    ],
)
def test_not_image_classification(keys, load, tmp_path):
    write(tmp_path / "data", draw(), keys=keys)
    with pytest.raises(UserError, match=r"^shapes is not an image classification set"):
        load()


def test_images_of_16_bits(load, tmp_path):
    write(tmp_path / "data", draw(shape=(4, 5, 1)), shape=(4, 5, 1), dtype=np.uint16)
    with pytest.raises(UserError, match=r"^shapes is not .*; choose one of uint8 images"):
        load()


def test_images_that_are_none(load, tmp_path):
    write(tmp_path / "data", draw(), encode=lambda image: b"no image")
    with pytest.raises(UserError, match=r"is damaged .*cannot identify image"):
        load()


def test_other_splits_are_not_decoded(load, tmp_path):
    write(tmp_path / "data", draw({**SIZES, "extra": 6}))
    load()
    files = [path.name for path in (tmp_path / "cache").rglob("*_images.npy")]
    assert sorted(files) == ["test_images.npy", "train_images.npy"]


def test_images_that_differ_in_size(load, tmp_path):
    images = [np.zeros((4, 5 + i % 2, 3), np.uint8) for i in range(60)]
    splits = draw() | {"train": (images, np.arange(60) % 3)}
    write(tmp_path / "data", splits, shape=(None, None, 3))
    with pytest.raises(UserError, match=r"^the images of .* differ .*equal sizes"):
        load()


def test_splits_that_differ_in_size(load, tmp_path):
    splits = draw() | {"test": draw({"test": 9}, shape=(6, 5, 3))["test"]}
    write(tmp_path / "data", splits, shape=(None, None, 3))
    with pytest.raises(UserError, match=r"^the images of .* differ .*equal sizes"):
        load()


def test_another_file_format(load, tmp_path):
    folder = write(tmp_path / "data", draw())
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match=rf"^{folder} is prepared as tfrecord; "):
        load()


def cut_a_shard(folder):
    (file,) = folder.glob("*-test.*")
    file.write_bytes(file.read_bytes()[:-1000])


def lose_a_shard(folder):
    (file,) = folder.glob("*-test.*")
    file.unlink()


def cut_the_description(folder):
    (folder / "dataset_info.json").write_text("{")


def lose_the_features(folder):
    (folder / "features.json").unlink()


@pytest.mark.parametrize(
    "damage", [cut_a_shard, lose_a_shard, cut_the_description, lose_the_features]
)
def test_damaged_source(damage, load, tmp_path):
    folder = write(tmp_path / "data", draw())
    damage(folder)
    with pytest.raises(UserError, match=rf"^the prepared data in {folder} is damaged"):
        load()
    # Nothing of it stays in the cache.
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifra10", "did you mean cifar10?"),
        ("CIFAR10", "did you mean cifar10?"),
        ("digit", "did you mean digits?"),
        ("shape", "did you mean shapes?"),
        ("shapes:1.2", "did you mean shapes?"),
        ("../data", "choose digits, cifar10, cifar100, mnist, or"),
        ("", "choose digits, cifar10, cifar100, mnist, or"),
    ],
)
def test_unknown_name(name, hint, load, tmp_path):
    write(tmp_path / "data", draw())
    with pytest.raises(UserError) as caught:
        load(name)
    assert f"there is no data set {name!r}; {hint}" in str(caught.value)


def test_known_name_that_is_not_prepared(load, tmp_path):
    with pytest.raises(UserError) as caught:
        load("imagenet2012")
    for part in (
        f"imagenet2012 is not prepared in {tmp_path / 'data'};",
        "--config.data.data_dir or TFDS_DATA_DIR",
        "`tfds build imagenet2012 --file_format=array_record`",
    ):
        assert part in str(caught.value)


def test_version_that_is_not_prepared(load):
    with pytest.raises(UserError, match=r"with --config\.data\.name=mnist\.$"):
        load("mnist:1.0.0")


def test_neither_prepared_nor_a_network(load, tmp_path):
    with pytest.raises(UserError) as caught:
        load("mnist")
    for part in (
        f"mnist is not prepared in {tmp_path / 'data'}: ",
        "http://127.0.0.1:9/train-images-idx3-ubyte.gz cannot be downloaded",
        str(tmp_path / "data/downloads"),
        "--config.data.data_dir or TFDS_DATA_DIR",
        "--config.data.name=digits",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("variable", [True, False])
def test_folder_that_is_not_there(variable, load, tmp_path, monkeypatch):
    path = str(tmp_path / "nowhere")
    if variable:
        monkeypatch.setenv("TFDS_DATA_DIR", path)
    origin = "TFDS_DATA_DIR" if variable else r"data\.data_dir"
    with pytest.raises(UserError, match=f"^{origin} is {path}, which is not a folder"):
        load(data_dir="" if variable else path)


def test_prepares_what_is_not_prepared(load, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    folder = tmp_path / "data/downloads/cvjax"
    folder.mkdir(parents=True)
    splits, archives = {}, []
    for split, prefix, count in (("train", "train", 40), ("test", "t10k", 10)):
        images = rng.integers(0, 256, (count, 28, 28, 1), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        splits[split] = images, labels
        for file, header, array in (
            ("images-idx3", (2051, count, 28, 28), images),
            ("labels-idx1", (2049, count), labels),
        ):
            path = folder / f"{prefix}-{file}-ubyte.gz"
            packed = struct.pack(f">{len(header)}i", *header) + array.tobytes()
            path.write_bytes(gzip.compress(packed))
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            archives.append(Archive(f"http://host/{path.name}", len(content), digest))
    monkeypatch.setitem(PREPARABLE, "mnist", tuple(archives))
    dataset = load("mnist", val_examples=10)
    assert split_rows(dataset.train, dataset.val) == rows(*splits["train"])
    assert split_rows(dataset.test) == rows(*splits["test"])
    assert np.bincount(dataset.val.labels).tolist() == [1] * 10
    assert (tmp_path / "data/mnist/3.0.1/dataset_info.json").exists()
    assert "tensorflow" not in sys.modules


@pytest.mark.slow
def test_real_cifar10(tfds_dir, load):
    dataset = load("cifar10", data_dir=str(tfds_dir))
    train, val, test = dataset.train, dataset.val, dataset.test
    assert [len(split.labels) for split in (train, val, test)] == [45_000, 5_000, 10_000]
    assert np.bincount(train.labels).tolist() == [4_500] * 10
    assert np.bincount(val.labels).tolist() == [500] * 10
    assert np.bincount(test.labels).tolist() == [1_000] * 10
    assert dataset.class_names[:3] == ("airplane", "automobile", "bird")

    pixels = np.concatenate([train.images, val.images]).reshape(-1, 3)
    values = np.arange(256) / 255
    counts = np.stack([np.bincount(pixels[:, c], minlength=256) for c in range(3)])
    mean = counts @ values / len(pixels)
    std = np.sqrt(counts @ values**2 / len(pixels) - mean**2)
    np.testing.assert_allclose(mean, [0.49139968, 0.48215841, 0.44653091], atol=5e-9)
    np.testing.assert_allclose(std, [0.24703223, 0.24348513, 0.26158784], atol=5e-9)
    # CIFAR-10 holds no image twice, so that equal rows would be the same image.
    hashes = [{hash(image.tobytes()) for image in s.images} for s in (train, val, test)]
    assert len(set.union(*hashes)) == 60_000
    assert_equal(load("cifar10", data_dir=str(tfds_dir)), dataset)


@pytest.mark.slow
def test_real_mnist(tfds_dir, load):
    dataset = load("mnist", data_dir=str(tfds_dir))
    assert [len(s.labels) for s in (dataset.train, dataset.val, dataset.test)] == [
        55_000,
        5_000,
        10_000,
    ]
    # The counts of each digit that are published with MNIST.
    labels = np.concatenate([dataset.train.labels, dataset.val.labels])
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(labels).tolist() == counts
    assert np.bincount(dataset.test.labels).tolist() == [
        *(980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)
    ]
