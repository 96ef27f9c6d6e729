"""How training steps are compiled; the other tests' are compiled as conftest.py says."""

import jax
import pytest
from jax import numpy as jnp

from cvjax.training.compilation import compile_step


class Lowered:
    """Records the options that it is compiled with."""

    def compile(self, compiler_options):
        return compiler_options


@pytest.mark.parametrize(
    ("platform", "flags", "options"),
    [
        ("cpu", "", {"xla_backend_optimization_level": 1}),
        ("cpu", "--xla_dump_to=x", {"xla_backend_optimization_level": 1}),
        ("cpu", "--xla_backend_optimization_level=3", None),
        ("gpu", "", None),
    ],
)
def test_options(platform, flags, options, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert compile_step(Lowered()) == options


def test_jax_knows_the_options(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    step = compile_step(jax.jit(lambda x: jnp.sin(x) + 1).lower(jnp.zeros(3)))
    assert step(jnp.zeros(3)).tolist() == [1, 1, 1]
