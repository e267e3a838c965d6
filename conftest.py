"""Sets up tests: 8 virtual CPU devices, a store of compiled programs, profiles of properties, names for examples."""

import importlib.util
import os
import pathlib

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes run tests on one GPU
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # two runs at once on one machine

import hypothesis
import jax
import jax.numpy as jnp
import optax
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import optax_clip

# Many tests compile the same program, in any process, and so does the next run.
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent / ".programs"))
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # they put the folder's name into the key
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# HYPOTHESIS_PROFILE says how many examples a property tries. Only the long profile draws others in each run.
shared = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("quick", max_examples=25, derandomize=True, database=None, **shared)
hypothesis.settings.register_profile("full", max_examples=250, derandomize=True, database=None, **shared)
hypothesis.settings.register_profile("long", max_examples=10_000, database=None, **shared)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

PAGES = ["README.md", "docs/*.md", "docs/*/*.md"]  # `**` is one folder in these patterns
pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=PAGES).pytest()


if importlib.util.find_spec("tensorboardX") is None:  # `scripts/test --all` installs what these import
    collect_ignore_glob = ["tests/test_integrations.py", "docs/integrations/*.md"]


@pytest.fixture(autouse=True)
def _names_in_doctests(doctest_namespace):
    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax)
    doctest_namespace.update({name: getattr(optax_clip, name) for name in optax_clip.__all__})
    doctest_namespace.update(thresholds=optax_clip.thresholds, responses=optax_clip.responses)
