"""Paths that users give, the user's cache, files written whole and read with checks."""

import codecs
import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import re
import tempfile
import unicodedata
from collections.abc import Iterator
from typing import Any

import filelock
from absl import logging

from cvjax.errors import UserError

Path = str | os.PathLike[str]

# Begins what may stand for the folder of a trained network: one that comes with cvjax, see
# `storage.pretrained`.
PRETRAINED = "pretrained:"
TEMPORARY = ".tmp"  # ends the names of files that are not complete
_LONGEST_NAME = 255  # bytes, of nearly all file systems
# What flock(2) says on NFS, FUSE and other file systems that do without.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def user_path(given: Path, name: str) -> pathlib.Path:
    """The absolute path that a user means, with `~` expanded.

    Args:
      given: what the user wrote.
      name: the flag or key, for messages.

    Raises:
      UserError: for what is empty, the address of another machine, what looks like a flag,
        what is no text, or has a name that is too long.
    """
    text = os.fspath(given)
    if not text.strip():
        raise UserError(f"{name} is empty; name a path (is a shell variable unset?).")
    if re.match(r"[A-Za-z][\w+.-]+:/", text):
        raise UserError(
            f"{name} takes a path of this machine's file systems, got {text!r}; mount it, "
            "or copy it there."
        )
    if re.search(r"\$\{?[A-Za-z_]|%[A-Za-z_]+%", text) or (os.sep == "/" and "\\" in text):
        raise UserError(f"{name} takes a path as it is, without variables, got {text!r}.")
    if is_pretrained(text):
        raise UserError(
            f"{name} takes a path, got {text!r}, which means a trained network of cvjax: "
            "for config.init_from; or, without its pretrained:, for --pretrained of "
            "cvjax.predict, cvjax.export and cvjax.interop.torch."
        )
    if text.startswith("-"):
        raise UserError(
            f"{name} has no value: {text!r} looks like a flag; write ./{text} for a path "
            "of that name."
        )
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise UserError(
            f"{name} takes a name in UTF-8 without control characters, got {text!r}."
        )
    try:
        path = pathlib.Path(text).expanduser().absolute()
    except (RuntimeError, OSError) as error:
        raise UserError(f"{name} {text!r} means no path ({error}).") from error
    for part in path.parts:
        if len(os.fsencode(part)) > _LONGEST_NAME:
            raise UserError(
                f"{name} has a name of {len(os.fsencode(part))} bytes ({part[:20]}...); "
                f"file systems take up to {_LONGEST_NAME}."
            )
    return path


def may_exist(path: Path) -> bool:
    """Whether something is there, or is where one may not look."""
    try:
        os.stat(path)
    except PermissionError:  # to be told by who reads it
        return True
    except OSError:
        return False
    return True


def is_pretrained(source: Path) -> bool:
    """Whether this names a network that comes with cvjax, and not a run's folder."""
    return str(source).startswith(PRETRAINED)


def user_cache(name: str) -> pathlib.Path:
    """The folder of that name in cvjax's own part of the user's cache; not created here.

    Raises:
      UserError: $XDG_CACHE_HOME means no path.
    """
    cache = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME")
    return cache / "cvjax" / name


@contextlib.contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Keeps other processes out that lock the same path.

    The operating system lets go of the lock when this process ends, however it ends. On a
    file system without locks the file of `soft_lock` stands for it, which a killed process
    leaves behind: a later one on the same machine takes it over, on another one it has to
    be deleted.

    Args:
      path: of the lock's own file.
      timeout: how many seconds to wait for another process, -1 for as long as it takes.

    Raises:
      filelock.Timeout: another process holds it.
      OSError: the lock's file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_acquire(path, 0 if timeout < 0 else timeout))
        except filelock.Timeout:
            if timeout >= 0:
                raise
            logging.info("Another process holds %s; waiting for it.%s", path, advice(path))
            stack.enter_context(_acquire(path, timeout))
        yield


def advice(path: Path) -> str:
    """What to do about a lock's holder that may be gone; empty where it cannot be."""
    soft = _soft(path)
    return f" If that process is gone, delete {soft}." if soft.exists() else ""


def _soft(path: Path) -> pathlib.Path:
    return pathlib.Path(f"{path}.soft")


def _acquire(path: Path, timeout: float) -> contextlib.AbstractContextManager:
    try:
        return filelock.FileLock(path, fallback_to_soft=False).acquire(timeout=timeout)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logging.warning(
            "The file system of %s has no locks (%s); the file %s keeps others out.",
            *(pathlib.Path(path).parent, error.strerror, _soft(path)),
        )
        return filelock.SoftFileLock(_soft(path)).acquire(timeout=timeout)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Writes or replaces a file; a process that is killed meanwhile changes nothing.

    Raises:
      UserError: it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[pathlib.Path]:
    """Gives a temporary name in the same folder; what is written there becomes `path`.

    After an error within, and after a kill, `path` is as it was. A link stays one: what it
    leads to is written.

    Raises:
      UserError: for an OSError within, naming `path`, and if that is no file.
    """
    refuse_special(path)
    path = pathlib.Path(os.path.realpath(path))
    temporary = None
    try:
        handle, name = tempfile.mkstemp(TEMPORARY, f".{path.name[:50]}.", path.parent)
        temporary = pathlib.Path(name)
        temporary.chmod(0o666 & ~_umask())  # mkstemp keeps others out
        try:
            yield temporary
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def refuse_special(path: Path) -> None:
    """Raises UserError if there is a folder, device, pipe or circle of links."""
    path = pathlib.Path(path)
    if not os.path.lexists(os.path.realpath(path)) or path.is_file():
        return
    kind = "a folder" if path.is_dir() else "a device, a pipe or a link to itself"
    raise UserError(f"{path} is no file but {kind}; name another file to write.")


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def unwritable(path: Path, error: Exception) -> UserError:
    """The error to raise for a write that failed."""
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0][:200]
    return UserError(
        f"{path} cannot be written ({reason}); what was saved before is as it was: make "
        "room or change the permissions, and give the same command again."
    )


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON, all of it or nothing; null for NaN and infinity.

    Raises:
      UserError: it cannot be written.
    """
    write_bytes(path, f"{to_json(content)}\n".encode())


def to_json(content: Any) -> str:
    """`content` as indented JSON; null for NaN and infinity."""
    return json.dumps(_finite(content), indent=2, allow_nan=False)


def _finite(content: Any) -> Any:
    """The content with None in place of numbers that JSON does not have."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def read_text(path: Path) -> str:
    """A text in UTF-8, or UTF-16 with its mark, of any editor; lines end in "\\n".

    Raises:
      OSError, UnicodeDecodeError: it cannot be read, or is no such text.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():  # a pipe or a device may have no end
        raise OSError(errno.EINVAL, "it is not a regular file")
    content = path.read_bytes()
    # Editors of Windows mark UTF-8 and UTF-16 by their first bytes.
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if marked else "utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, keys: dict[str, type], hint: str, kind: type = dict) -> Any:
    """A JSON object that has these keys with values of these types, or a list.

    Args:
      path: of the file.
      keys: what the object must hold.
      hint: what to do if it does not, for the end of the message.
      kind: of what the file holds; object for anything.

    Raises:
      UserError: the file cannot be read, or is none such; names the file and what is wrong
      with it.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {hint}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: no JSON ({error}); {hint}") from error
    problem = None
    if not isinstance(content, kind):
        problem = f"it holds {type(content).__name__}, no {kind.__name__}"
    else:
        for key, kinds in keys.items():
            if key not in content:
                problem = f"it has no {key!r}"
            elif not isinstance(content[key], kinds) or isinstance(content[key], bool):
                problem = f"its {key!r} is {str(content[key])[:40]!r}"
    if problem:
        raise UserError(f"{path} is damaged: {problem}; {hint}")
    return content
