"""Every test sees eight simulated devices, strict ranks and one compile cache; slow tests run with --slow."""

import os
from pathlib import Path

import pytest

from dsjax.__main__ import SIMULATED_FLAGS

# Before JAX is imported, here or by a test.
os.environ["XLA_FLAGS"] = SIMULATED_FLAGS.format(devices=8)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

REPOSITORY = Path(__file__).parents[1]

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(REPOSITORY / ".cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture
def repository() -> Path:
    return REPOSITORY
