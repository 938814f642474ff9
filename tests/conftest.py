"""Every test sees eight simulated devices, strict ranks and one compile cache; slow tests run with --slow."""

import gc
import os
from pathlib import Path

import pytest

from dsjax.__main__ import SIMULATED_FLAGS

# Before JAX is imported, here or by a test.
os.environ["XLA_FLAGS"] = SIMULATED_FLAGS.format(devices=8)
os.environ["JAX_PLATFORMS"] = "cpu"
# Else the name of the compile cache's directory is part of its keys, and a test that names another one shares nothing.
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"

import jax  # noqa: E402

REPOSITORY = Path(__file__).parents[1]
CACHE = {
    "jax_compilation_cache_dir": str(REPOSITORY / ".cache" / "xla"),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
MAPS = Path("/proc/self/maps")


def use_cache():
    for name, value in CACHE.items():
        jax.config.update(name, value)


use_cache()
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config):
    """Before JAX computes anything: most of a fast run would go into LLVM's optimisations.

    XLA's own passes are the same. The slow run, and with it CI, compiles what users run.
    """
    if not config.getoption("--slow"):
        os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


def pytest_collection_finish():
    """Tracing makes objects by the million, and a fifth of its time would go into looking through what stays."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def cache_stays():
    """A run with a compile cache of its own leaves the others theirs."""
    yield
    use_cache()


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Every compiled program takes memory maps; Linux gives a process 65,530, and XLA crashes when they are used up."""
    yield
    if MAPS.exists() and MAPS.read_text().count("\n") > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def repository() -> Path:
    return REPOSITORY
