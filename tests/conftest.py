"""Every test runs on eight simulated CPU devices. Tracing and compiling are most of the suite's time, so XLA optimizes
little, and the garbage collector runs seldom.

Workers, and other processes that tests start, share compiled programs on disk; the session removes them at its end.
"""

import gc
import os
import pathlib
import shutil
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# One piece per program: the default, up to 32 pieces for as many threads, takes a third more CPU time.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR") or tempfile.mkdtemp("_programs")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"  # below that, reading takes as long as compiling

import jax

if jax.__version_info__ < (0, 11):  # without fusion emitters it compiles in a third of the time
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_num_cpu_devices", 8)
gc.set_threshold(50_000, 20, 20)  # tracing makes many objects and few cycles; the default takes a sixth of the time
pytest.register_assert_rewrite("tests.support")


def pytest_unconfigure():
    programs = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    if "PYTEST_XDIST_WORKER" not in os.environ and programs.name.endswith("_programs"):
        shutil.rmtree(programs, ignore_errors=True)


@pytest.fixture(scope="session")
def two_tower():
    """configs/clip.py:smoke before its first step; tests do not change it."""
    from configs import clip
    from tests.support.models import untrained

    return untrained(clip.get_config("smoke"))


@pytest.fixture(scope="session")
def captioner():
    """configs/cappa.py:smoke before its first step, with a head whose texts end; tests do not change it."""
    from configs import cappa
    from tests.support.models import untrained

    return untrained(cappa.get_config("smoke"), opinionated=True)
