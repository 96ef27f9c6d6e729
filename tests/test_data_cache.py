"""The cache of decoded images, without any data set behind it."""

import dataclasses
import json
import shutil
import threading
import time

import numpy as np
import pytest

from cvjax.data import cache, tfds
from cvjax.errors import UserError

SOURCE = tfds.Source("toy", "1.0.0", None, "0123456789abcdef" * 4)


def make_decoded():
    rng = np.random.default_rng(0)
    counts = {"train": 20, "test": 5}
    return tfds.Decoded(
        images={
            split: rng.integers(0, 256, (count, 4, 5, 3)).astype(np.uint8)
            for split, count in counts.items()
        },
        labels={
            split: rng.integers(0, 3, count).astype(np.int32)
            for split, count in counts.items()
        },
        class_names=("a", "b", "ü"),
        fingerprint="f00",
    )


def decode(_):
    return make_decoded()


def must_not_decode(_):
    raise AssertionError("decoded, although it is in the cache")


def assert_sound(decoded):
    expected = make_decoded()
    for split in ("train", "test"):
        for found, array in (
            (decoded.images, expected.images),
            (decoded.labels, expected.labels),
        ):
            np.testing.assert_array_equal(found[split], array[split])
            assert found[split].dtype == array[split].dtype
    assert decoded.class_names == expected.class_names
    assert decoded.fingerprint == expected.fingerprint


def entry_of(folder):
    (entry,) = (path for path in folder.iterdir() if path.is_dir())
    return entry


def test_decodes_once_and_then_maps(tmp_path):
    assert_sound(cache.read_or_decode(SOURCE, decode, tmp_path))
    decoded = cache.read_or_decode(SOURCE, must_not_decode, tmp_path)
    assert_sound(decoded)
    assert isinstance(decoded.images["train"], np.memmap)
    assert not decoded.images["train"].flags.writeable


@pytest.mark.parametrize("change", ["version", "fingerprint", "name"])
def test_another_source_has_its_own_entry(change, tmp_path):
    cache.read_or_decode(SOURCE, decode, tmp_path)
    values = {"name": "toy2", "version": "1.0.1", "fingerprint": "f" * 64}
    other = tfds.Source(**{**vars(SOURCE), change: values[change]})
    calls = []
    cache.read_or_decode(other, lambda s: calls.append(s) or make_decoded(), tmp_path)
    assert calls == [other]


def truncate(entry):
    file = entry / "train_images.npy"
    file.write_bytes(file.read_bytes()[:-1])


def lose_a_file(entry):
    (entry / "test_labels.npy").unlink()


def lose_the_manifest(entry):
    (entry / "manifest.json").unlink()


def cut_the_manifest(entry):
    file = entry / "manifest.json"
    file.write_text(file.read_text()[:20])


def write_an_older_manifest(entry):
    manifest = json.loads((entry / "manifest.json").read_text())
    del manifest["fingerprint"]
    (entry / "manifest.json").write_text(json.dumps(manifest))


def swap_a_file(entry):
    np.save(entry / "train_labels.npy", np.zeros(3, np.int32))


def overwrite_a_header(entry):
    file = entry / "train_images.npy"
    file.write_bytes(b"\0" * 128 + file.read_bytes()[128:])


def another_format(entry):
    file = entry / "manifest.json"
    file.write_text(file.read_text().replace(f'"format": {cache.FORMAT}', '"format": -1'))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        lose_a_file,
        lose_the_manifest,
        cut_the_manifest,
        write_an_older_manifest,
        swap_a_file,
        overwrite_a_header,
        another_format,
    ],
)
def test_damaged_entry_is_decoded_again_with_a_notice(damage, tmp_path, caplog):
    cache.read_or_decode(SOURCE, decode, tmp_path)
    entry = entry_of(tmp_path)
    damage(entry)
    assert cache.find_entry("toy", tmp_path) is None
    assert_sound(cache.read_or_decode(SOURCE, decode, tmp_path))
    assert f"{entry} are damaged; decoding again" in caplog.text
    assert_sound(cache.read_or_decode(SOURCE, must_not_decode, tmp_path))


def test_several_at_once_decode_once(tmp_path):
    calls, results = [], []
    barrier = threading.Barrier(4)

    def slow_decode(source):
        calls.append(source)
        time.sleep(0.1)
        return make_decoded()

    def work():
        barrier.wait()
        results.append(cache.read_or_decode(SOURCE, slow_decode, tmp_path))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(results) == 4
    for decoded in results:
        assert_sound(decoded)


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    save, saved = np.save, []

    def interrupted_save(file, array):
        if saved:
            raise KeyboardInterrupt
        saved.append(file)
        save(file, array)

    monkeypatch.setattr(np, "save", interrupted_save)
    with pytest.raises(KeyboardInterrupt):
        cache.read_or_decode(SOURCE, decode, tmp_path)
    monkeypatch.undo()
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert_sound(cache.read_or_decode(SOURCE, decode, tmp_path))


def test_what_a_killed_process_was_writing_goes(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # SIGKILL: nothing is tidied up
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(np, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.read_or_decode(SOURCE, decode, tmp_path)
    assert len(list(tmp_path.glob(".writing-*"))) == 1
    assert_sound(cache.read_or_decode(SOURCE, decode, tmp_path))
    assert not list(tmp_path.glob(".writing-*"))


def test_full_disk_is_told_in_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError) as caught:
        cache.read_or_decode(SOURCE, decode, tmp_path)
    for part in ("toy", str(tmp_path), "No space left", "--config.data.cache_dir"):
        assert part in str(caught.value)


def test_entry_without_source(tmp_path):
    assert cache.find_entry("toy", tmp_path) is None
    cache.read_or_decode(SOURCE, decode, tmp_path)
    for name in ("toy", "toy:1.0.0"):
        assert_sound(cache.find_entry(name, tmp_path))
    for name in ("toy:1.0.1", "to", "toy/x", "toy:1.0"):
        assert cache.find_entry(name, tmp_path) is None, name


def test_entry_without_source_of_a_like_name(tmp_path):
    for name, version in (("toy/dark-blue", "1.0.0"), ("toy/dark", "9.0.0")):
        source = tfds.Source(**{**vars(SOURCE), "name": name, "version": version})
        cache.read_or_decode(source, decode, tmp_path)
    newest = dataclasses.replace(make_decoded(), fingerprint="newest")
    source = tfds.Source(**{**vars(SOURCE), "name": "toy/dark", "version": "10.0.0"})
    cache.read_or_decode(source, lambda _: newest, tmp_path)
    assert cache.find_entry("toy/dark", tmp_path).fingerprint == "newest"
    assert_sound(cache.find_entry("toy/dark:9.0.0", tmp_path))
    for entry in tmp_path.glob("toy~dark-?*.0.0-*"):
        if entry.is_dir() and "blue" not in entry.name:
            shutil.rmtree(entry)
    assert cache.find_entry("toy/dark", tmp_path) is None
    assert_sound(cache.find_entry("toy/dark-blue", tmp_path))


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.resolve_cache_dir("") == tmp_path / "xdg/cvjax/data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.resolve_cache_dir("") == tmp_path / "home/.cache/cvjax/data"
    assert cache.resolve_cache_dir("~/there") == tmp_path / "home/there"


def test_unwritable_folder(tmp_path):
    # A folder below a file: permissions would not stop root.
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        cache.resolve_cache_dir(str(tmp_path / "file" / "cache"))
    for part in (str(tmp_path / "file" / "cache"), "--config.data.cache_dir"):
        assert part in str(caught.value)
