"""Paths that users give, the user's cache, files written whole and read with checks."""

import contextlib
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

from cvjax.errors import UserError

Path = str | os.PathLike[str]

TEMPORARY = ".tmp"  # ends the names of files that are not complete
_LONGEST_NAME = 255  # bytes, of nearly all file systems


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


def user_cache(name: str) -> pathlib.Path:
    """The folder of that name in cvjax's own part of the user's cache; not created here."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return cache.expanduser().absolute() / "cvjax" / name


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

    After an error within, and after a kill, `path` is as it was.

    Raises:
      UserError: for an OSError within, naming `path`.
    """
    path = pathlib.Path(path)
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


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def unwritable(path: Path, error: Exception) -> UserError:
    """What to tell of a write that failed."""
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
    text = json.dumps(_finite(content), indent=2, allow_nan=False)
    write_bytes(path, f"{text}\n".encode())


def _finite(content: Any) -> Any:
    """The content with None in place of numbers that JSON does not have."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def read_json(path: Path, keys: dict[str, type], hint: str, kind: type = dict) -> Any:
    """A JSON object that has these keys with values of these types, or a list.

    Args:
      path: of the file.
      keys: what the object must hold.
      hint: what to do if it does not, for the end of the message.
      kind: of what the file holds; object for anything.

    Raises:
      UserError: the file cannot be read, or is none such; names file and flaw.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {hint}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: no JSON ({error}); {hint}") from error
    flaw = None
    if not isinstance(content, kind):
        flaw = f"it holds {type(content).__name__}, no {kind.__name__}"
    else:
        for key, kinds in keys.items():
            if key not in content:
                flaw = f"it has no {key!r}"
            elif not isinstance(content[key], kinds) or isinstance(content[key], bool):
                flaw = f"its {key!r} is {str(content[key])[:40]!r}"
    if flaw:
        raise UserError(f"{path} is damaged: {flaw}; {hint}")
    return content
