"""What every test runs under: 8 CPU devices, float32 unless asked otherwise, the same generated inputs every time."""

from __future__ import annotations

import contextlib
import os

_DEVICES = "--xla_force_host_platform_device_count"

# XLA reads the flags when the backend starts, so this stands before anything that imports JAX; jaxbound adds its own.
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("deterministic", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.register_profile(
    "thorough", parent=hypothesis.settings.get_profile("deterministic"), max_examples=2000
)
hypothesis.settings.load_profile("deterministic")


def pytest_collection_modifyitems(items):
    """Doctests show every public name at work, so they belong to the fast subset for newer versions."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.fast)


@pytest.fixture
def x64():
    """float64 for one test; `@pytest.mark.x64` does the same."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def _precision(request):
    """float32 is what users have, so it is the default here too, whatever ran before."""
    wanted = request.node.get_closest_marker("x64") is not None
    with jax.enable_x64(True) if wanted else contextlib.nullcontext():
        yield
    assert not jax.config.jax_enable_x64, "a test left float64 on; use the x64 fixture or marker"
