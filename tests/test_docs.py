"""The documents: links that exist, commands and code that parse."""

import pathlib
import re
import shlex

import numpy as np
import pytest

from cvjax.models import MODELS
from cvjax.training import default_config

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
# Stand for what the reader has.
PLACEHOLDERS = ("NAME", "...")


def anchor(heading: str) -> str:
    """The name that GitHub gives to a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def anchors(path: pathlib.Path) -> set[str]:
    return {
        anchor(line.lstrip("#"))
        for line in path.read_text().splitlines()
        if line[:1] == "#"
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_exist(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        file, _, name = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        assert not name or name in anchors(found), target


def commands(path: pathlib.Path) -> list[str]:
    """Command lines of Python in fenced blocks and in `code`, continued lines joined."""
    text = path.read_text()
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    starts = re.compile(r"^\s*(?:\S*/)?python3? (?:-m|train\.py)")
    return [line.strip() for line in lines if starts.match(line)]


EVERY = sorted({line for path in DOCUMENTS for line in commands(path)})


def test_commands_are_found():
    assert len(EVERY) > 30
    assert any(line.startswith(".venv/bin/python train.py") for line in EVERY)


@pytest.mark.parametrize("line", EVERY)
def test_commands_parse(line):
    """The program exists, has these flags, and knows the preset, config and fields."""
    words = shlex.split(line, comments=True)[1:]
    module, words = (words[1], words[2:]) if words[0] == "-m" else ("train", words[1:])
    if any(hole in module for hole in PLACEHOLDERS):
        return
    source = program_text(module)
    known = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source))
    for word in words:
        if not word.startswith("--"):
            continue
        flag, _, value = word[2:].partition("=")
        name, _, key = flag.partition(".")
        assert name in known, word
        if name == "config" and key:
            assert has_key(key), word
        elif name == "config" and not any(hole in value for hole in PLACEHOLDERS):
            assert (ROOT / value).exists(), word
        elif name == "preset" and not any(end in value for end in ("|", *PLACEHOLDERS)):
            assert f'"{value}"' in source, word


SHARED_FLAGS = [ROOT / f"experiments/{name}.py" for name in ("runner", "sharing")]
SHARED_FLAGS += [ROOT / "cvjax/training/network_flags.py", ROOT / "cvjax/command_line.py"]


def program_text(module: str) -> str:
    """The source of a program, of the presets that it imports, and of shared flags."""
    path = ROOT / module.replace(".", "/")
    folder = path.is_dir()
    text = "".join(file.read_text() for file in path.glob("*.py")) if folder else ""
    text = text or path.with_suffix(".py").read_text()
    for package in re.findall(r"^from ([\w.]+)\.presets import", text, re.MULTILINE):
        text += (ROOT / package.replace(".", "/") / "presets.py").read_text()
    for path in SHARED_FLAGS:
        used = re.search(rf"\b{path.stem}\.define_(flags|config)\b", text)
        text += path.read_text() * bool(used)
    return text


def has_key(key: str) -> bool:
    """Whether some network's config has the key, such as model.depth."""
    for name in MODELS:
        node = default_config(name)
        if all((node := node.get(part)) is not None for part in key.split(".")):
            return True
    return False


def test_code_of_the_readme_runs():
    code = re.findall(r"^```python\n(.*?)^```", DOCUMENTS[0].read_text(), re.M | re.S)
    theta = np.array([0.1, 0.2, 0.3])
    names = {"f": lambda x, theta: theta * x, "theta": theta}
    exec(code[0], names)
    assert names["stage"](1.0, theta) == pytest.approx(1.1 * 1.2 * 1.3)
    assert names["stage"](1.0, names["tied"]) == pytest.approx(1.1**3)
    finer = names["stage"](1.0, names["finer"], h=0.5)
    assert finer == pytest.approx((1.05 * 1.1 * 1.15) ** 2)


def test_readme_is_short():
    assert len(DOCUMENTS[0].read_text().splitlines()) <= 120
