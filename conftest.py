"""Sets up tests: 8 virtual CPU devices, GPU memory as needed, a store of compiled programs, names for examples."""

import os
import pathlib

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes run tests on one GPU

import jax
import jax.numpy as jnp
import optax
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import optax_clip

# Many tests compile the same program, in any process, and so does the next run. Nothing is locked: a program that
# another process is just writing cannot be read, and is compiled again.
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent / ".programs"))
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # they put the folder's name into the key
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

PAGES = ["README.md", "docs/*.md", "docs/*/*.md"]  # `**` is one folder in these patterns
pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=PAGES).pytest()


@pytest.fixture(autouse=True)
def _names_in_doctests(doctest_namespace):
    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax)
    doctest_namespace.update({name: getattr(optax_clip, name) for name in optax_clip.__all__})


@pytest.fixture(autouse=True)
def _room_for_programs(request):
    """Leaves a property to itself: ten thousand examples compile nearly as much as one process may hold."""
    many = os.environ.get("HYPOTHESIS_PROFILE") == "long"
    drop = jax.clear_caches if many and hasattr(getattr(request.node, "obj", None), "hypothesis") else lambda: None
    drop()
    yield
    drop()
