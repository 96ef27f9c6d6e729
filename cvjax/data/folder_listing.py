"""Which pictures a folder holds, of which class, and in which split.

    DIR/train/CLASS/...    and val/ and test/ likewise, or one of them, or neither
    DIR/CLASS/...          or the classes alone

Folders below a class belong to it. Symbolic links are followed, except for those that lead
to another class or above their own, which would put its pictures into this one too.

A split that is not there is a tenth of the other pictures (of train/, or of all), chosen by
the hash of CLASS/.../NAME: adding pictures moves no old one, and a copy of the folder has
the same splits.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
import unicodedata
from collections.abc import Iterator

from cvjax.data.dataset import check_class_names
from cvjax.errors import UserError
from cvjax.files import user_path

SPLITS = ("train", "val", "test")
# What others call them, in small letters.
LIKE_SPLITS = ("training", "trainset", "train_set", "validation", "valid", "dev", "eval")
LIKE_SPLITS += ("testing", "testset", "test_set", "holdout")
# By their names alone; whether the content is valid shows when it is decoded.
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp")
SUFFIXES += (".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
# What programs leave behind in folders of pictures, beside hidden files.
LEFT_BEHIND = ("thumbs.db", "desktop.ini", "__macosx")
_LINK = "link to another class or above its own"
# Of the hashes, from 0 to 1: these go to a split that is not there.
SHARES = {"test": (0.0, 0.1), "val": (0.1, 0.2)}


@dataclasses.dataclass(frozen=True)
class Listing:
    """The pictures of a folder, by their names.

    Attributes:
      root: the folder, absolute.
      class_names: sorted; in Unicode's composed form, whatever the file system has.
      files: for each split the paths below `root`, sorted, and their classes' numbers.
      hashed: the splits that are not there, but made by the hash of the names.
      left_out: why files are no part of it, and how many.
    """

    root: pathlib.Path
    class_names: tuple[str, ...]
    files: dict[str, list[tuple[str, int]]]
    hashed: tuple[str, ...]
    left_out: dict[str, int]


def list_folder(folder: str | os.PathLike[str]) -> Listing:
    """Lists the pictures of a folder; nothing is opened.

    Hidden files and `LEFT_BEHIND` are passed over.

    Raises:
      UserError: the folder cannot be read, or is not laid out as said above: fewer than two
        classes, a class without pictures, a class that is in one split alone.
    """
    root = user_path(folder, "data.data_dir")
    left_out = collections.Counter()
    try:
        tops = _tops(root)
        owners = _owners(tops)
        found = {split: _classes(top, owners, left_out) for split, top in tops.items()}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}).") from error
    train = found["train"]
    names = _class_names(tops["train"], train)
    for split in found.keys() - {"train"}:
        _check_known(tops[split], found[split], names)
    hashed = tuple(split for split in ("val", "test") if split not in found)
    files = {split: [] for split in SPLITS}
    for split, classes in found.items():
        for name, paths in classes.items():
            for key, path in paths:
                part = _by_hash(f"{name}/{key}", hashed) if split == "train" else split
                files[part].append((_below(root, path), names.index(name)))
    files = {split: sorted(pairs) for split, pairs in files.items()}
    _check_splits(root, files, names, hashed)
    return Listing(root, names, files, hashed, dict(left_out))


def _tops(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The folder of the classes of each split that is there."""
    if not root.is_dir():
        raise UserError(
            f"data.data_dir {root} is not a folder; name the one that holds train/CLASS/* "
            "or CLASS/*."
        )
    children = [entry.name for entry in _visible(root) if entry.is_dir()]
    if "train" not in children:
        wrong = [name for name in children if name.lower() in ("train", "val", "test")]
        if any(name.lower() == "train" for name in children):
            raise UserError(
                f"{root} has {' and '.join(wrong)}: write them in small letters."
            )
        if wrong:
            raise UserError(
                f"{root} has {' and '.join(wrong)}, but no train; add it, or put the "
                "classes alone into the folder."
            )
        alike = [
            name
            for name in children
            if name.lower() in LIKE_SPLITS
            and any(entry.is_dir() for entry in _visible(root / name))
        ]
        if len(alike) > 1:
            raise UserError(
                f"{root} has {' and '.join(alike)}, which hold folders and are no classes, "
                "it seems; name the splits train, val and test."
            )
        return {"train": root}
    others = [name for name in children if name not in SPLITS]
    if others:
        raise UserError(
            f"beside {root}/train stands {', '.join(others[:3])}: only train, val and test "
            "are read there; rename it or move it elsewhere."
        )
    return {split: root / split for split in SPLITS if split in children}


@dataclasses.dataclass(frozen=True)
class _Owners:
    """Whose the folders are that links may lead to.

    Attributes:
      classes: of the real path of each class's folder, of any split, the class.
      above: the real paths of the folders that a class's is in.
    """

    classes: dict[str, str]
    above: frozenset[str]

    def refuse(self, entry: os.DirEntry, name: str) -> bool:
        """Whether this is a link from the class to another one, or above its own."""
        if not entry.is_symlink():
            return False
        real = os.path.realpath(entry.path)
        if real in self.above:
            return True
        return any(self.classes.get(path, name) != name for path in (real, *_above(real)))


def _owners(tops: dict[str, pathlib.Path]) -> _Owners:
    entries = [entry for top in tops.values() for entry in _visible(top) if entry.is_dir()]
    # Folders before links: a link to another class's folder does not own it.
    entries.sort(key=lambda entry: entry.is_symlink())
    classes, above = {}, set()
    for entry in entries:
        real = os.path.realpath(entry.path)
        if real not in above:
            classes.setdefault(real, _composed(entry.name))
            above.update(_above(real))
    return _Owners(classes, frozenset(above))


def _above(path: str) -> Iterator[str]:
    while (parent := os.path.dirname(path)) != path:
        yield (path := parent)


def _classes(top: pathlib.Path, owners: _Owners, left_out: collections.Counter):
    """{class: [(path below the class, composed; path), ...]}; counts what is left out."""
    classes = {}
    for entry in _visible(top):
        if not entry.is_dir():
            left_out[f"outside any class, in {top.name}"] += 1
            continue
        name = _composed(entry.name)
        if owners.refuse(entry, name):
            left_out[_LINK] += 1
            continue
        if name in classes:
            raise UserError(
                f"{top} has two folders {name!r} that differ in Unicode's form alone; "
                "merge them."
            )
        pictures = []
        for file in _walk(entry.path, name, owners, left_out):
            suffix = os.path.splitext(file.name)[1].lower()
            if suffix in SUFFIXES:
                inner = _below(entry.path, file.path)
                pictures.append((_composed(inner), file.path))
            else:
                left_out[f"no picture by its name ({suffix or 'no suffix'})"] += 1
        classes[name] = pictures
    return classes


def _visible(folder: str | os.PathLike[str]) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        kept = [
            entry
            for entry in entries
            if not entry.name.startswith(".") and entry.name.lower() not in LEFT_BEHIND
        ]
    return sorted(kept, key=lambda entry: entry.name)


def _walk(
    folder: str,
    name: str,
    owners: _Owners,
    left_out: collections.Counter,
    above: tuple[str, ...] = (),
) -> Iterator[os.DirEntry]:
    """The files of a class, at any depth."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it is in
        return
    for entry in _visible(folder):
        if owners.refuse(entry, name):
            left_out[_LINK] += 1
        elif entry.is_dir():
            yield from _walk(entry.path, name, owners, left_out, (*above, real))
        else:
            yield entry


def _below(folder: str | os.PathLike[str], path: str) -> str:
    """The path from a folder on; pathlib takes seconds for 100,000."""
    return path[len(os.fspath(folder)) + 1 :].replace(os.sep, "/")


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _class_names(top: pathlib.Path, classes: dict[str, list]) -> tuple[str, ...]:
    names = tuple(sorted(classes))
    if len(names) < 2:
        inner = f" (do you mean {top / names[0]}?)" if names else ""
        raise UserError(
            f"{top} holds {len(names)} folders of pictures{inner}; it takes one for each "
            "class, and two classes or more."
        )
    check_class_names(names, str(top))
    lower = collections.defaultdict(list)
    for name in names:
        lower[name.casefold()].append(name)
        if not classes[name]:
            raise UserError(
                f"the class {name!r} has no pictures in {top / name}; add some "
                f"({', '.join(SUFFIXES[:5])}, ...), or remove the folder."
            )
    for alike in lower.values():
        if len(alike) > 1:
            raise UserError(
                f"the classes {' and '.join(map(repr, alike))} in {top} differ in capital "
                "letters alone; merge them, or give them other names."
            )
    return names


def _check_known(top: pathlib.Path, classes: dict[str, list], names: tuple[str, ...]):
    unknown = [name for name in classes if name not in names and classes[name]]
    if unknown:
        by_case = {name.casefold(): name for name in names}
        closest = by_case.get(unknown[0].casefold())
        hint = f" (there is {closest!r})" if closest else ""
        raise UserError(
            f"{top} has the class {unknown[0]!r}, which train lacks{hint}; all classes "
            "have to be in train."
        )


def _by_hash(key: str, hashed: tuple[str, ...]) -> str:
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    for split in hashed:
        least, end = SHARES[split]
        if least <= place < end:
            return split
    return "train"


def _check_splits(root, files, names, hashed) -> None:
    for split, pairs in files.items():
        if not pairs:
            why = ", where a tenth of the pictures goes by their names" * (split in hashed)
            raise UserError(
                f"no picture of {root} is in {split}{why}; add pictures, or put some into "
                f"{root}/{split} (and the others into {root}/train)."
            )
    missing = set(range(len(names))) - {label for _, label in files["train"]}
    if missing:
        raise UserError(
            f"all pictures of the class {names[min(missing)]!r} in {root} go to val and "
            "test by their names; add pictures, or make train, val and test yourself."
        )
