"""What every test runs under: 8 CPU devices, float32 unless asked otherwise, the same generated inputs every time."""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import importlib.util
import itertools
import os
from pathlib import Path


def _add_flag(name: str, value: object) -> None:
    if name not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {name}={value}".strip()


# XLA reads the flags when the backend starts, so this stands before anything that imports JAX; jaxbound adds its own.
_add_flag("--xla_force_host_platform_device_count", 8)

# Compiling takes most of the time: what is the same is compiled once, for both workers and for the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

_MOST_MAPS = 20_000
"""Of 65,530 that Linux allows by default; one test may make a few thousand."""
_TESTS = itertools.count()

hypothesis.settings.register_profile("deterministic", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.register_profile(
    "thorough", parent=hypothesis.settings.get_profile("deterministic"), max_examples=2000
)
hypothesis.settings.load_profile("deterministic")


def pytest_configure(config):
    """Quick runs leave out XLA's slowest passes, those marked `optimised` fewer; `make soundness` tests what users run."""
    if config.option.markexpr != "slow":
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"  # for other processes
        jax.config.update("jax_disable_most_optimizations", True)
        _add_flag("--xla_backend_optimization_level", 1)
        if jax.__version_info__ < (0, 11):  # later ones do not know it
            _add_flag("--xla_cpu_use_fusion_emitters", "false")
        _share_the_context_of_lowering()


def _share_the_context_of_lowering():
    """JAX makes an MLIR context for each program that it lowers, which takes a fifth of the time of a warm run."""
    with contextlib.suppress(ImportError, AttributeError):  # JAX's own affair: without it all is only slower
        from jax._src.interpreters import mlir

        mlir.make_ir_context = functools.cache(mlir.make_ir_context)


@functools.cache
def _is_of(room: str, path: Path) -> bool:
    """Whether a file is of a room, or imports from it."""
    return f"jaxbound/{room}" in path.as_posix() or f"jaxbound.{room}" in path.read_text(encoding="utf-8")


def pytest_addoption(parser):
    parser.addoption("--room", help="run the doctests of one room, and the tests that import from it")


def pytest_collection_modifyitems(config, items):
    """What belongs to which subset.

    Doctests show every public name at work, so they belong to the fast subset for newer versions. Of the cases of a
    test that is marked `quick(n)`, n belong to the quick runs, evenly; the others are slow. Tests named in
    `long_tests.txt`, which took longest in a whole run, are `long`: `make test` leaves them to `make test-all`.
    """
    if room := config.getoption("--room"):
        items[:] = [item for item in items if _is_of(room, item.path)]
    lengthy = set((Path(__file__).parent / "long_tests.txt").read_text(encoding="utf-8").split())
    for item in items:
        if item.nodeid.partition("[")[0] in lengthy:
            item.add_marker(pytest.mark.long)
    cases = collections.defaultdict(list)
    for item in items:
        if (mark := item.get_closest_marker("quick")) and not item.get_closest_marker("slow"):
            cases[item.nodeid.partition("[")[0], *mark.args].append(item)
    for (_, count), some in cases.items():
        chosen = {round(k * (len(some) - 1) / max(count - 1, 1)) for k in range(count)}
        for k in set(range(len(some))) - chosen:
            some[k].add_marker(pytest.mark.slow)
    no_solvers = pytest.mark.skip(reason="needs the extra: pip install 'jaxbound[exact]'")
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.fast)
            if item.name.startswith("jaxbound.methods.exact.") and importlib.util.find_spec("highspy") is None:
                item.add_marker(no_solvers)


@pytest.fixture(autouse=True)
def _few_programs():
    """Thousands of compiled programs would reach the system's limit on memory maps of a process: then XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if next(_TESTS) % 4:  # to read them takes a while
        return
    if maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def _optimisation(request):
    if request.config.option.markexpr == "slow" or not request.node.get_closest_marker("optimised"):
        yield
        return
    jax.clear_caches()  # of what was compiled without
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """float64 for one test; `@pytest.mark.x64` does the same."""
    with jax.enable_x64(True):
        yield


def _true_products():
    """Accelerators round products to TF32 or bfloat16; what tests compare bounds with must not be rounded so."""
    on_cpu = jax.default_backend() == "cpu"
    return contextlib.nullcontext() if on_cpu else jax.default_matmul_precision("highest")


@pytest.fixture(autouse=True)
def _precision(request):
    """float32 is what users have, so it is the default here too, whatever ran before."""
    wanted = request.node.get_closest_marker("x64") is not None
    with jax.enable_x64(True) if wanted else contextlib.nullcontext(), _true_products():
        yield
    assert not jax.config.jax_enable_x64, "a test left float64 on; use the x64 fixture or marker"
