"""Checks what the built distributions hold: nothing but the package, one version everywhere, and little."""

import email
import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile

ROOT = pathlib.Path(__file__).parents[1]
MOST_BYTES = 150_000  # of the wheel; it has about 80 kB
MODULES = set(subprocess.check_output(["git", "ls-files", "optax_clip"], cwd=ROOT, text=True).split())


def check(folder):
    """Raises an AssertionError for what should not be released."""
    assert not sys.flags.optimize, "run without -O: it would leave the checks out"
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    version = re.search(r'__version__ = "(.*)"', (ROOT / "optax_clip/__init__.py").read_text())[1]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE), (
        f"CHANGELOG.md has no dated section for {version}"
    )
    assert wheel.stat().st_size < MOST_BYTES, f"the wheel has {wheel.stat().st_size} bytes"
    assert wheel.name.startswith(f"optax_clip-{version}-") and sdist.name == f"optax_clip-{version}.tar.gz"
    with zipfile.ZipFile(wheel) as archive:
        about = f"optax_clip-{version}.dist-info"
        names = set(archive.namelist())
        metadata = email.message_from_bytes(archive.read(f"{about}/METADATA"))
    files = {f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    assert names - files == MODULES, f"the wheel differs from the package in {(names - files) ^ MODULES}"
    assert metadata["Version"] == version and metadata["License-Expression"] == "Apache-2.0"
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(re.match(r"[\w-]+", line)[0] for line in required) == ["jax", "optax"], required
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert held >= MODULES | {
        "LICENSE",
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "pyproject.toml",
        "conftest.py",
    }
    assert not any(re.search(r"(^|/)(\.venv|dist|__pycache__|demo\.png)", name) for name in held)
    print(f"optax_clip {version}: {len(names)} files in {wheel.stat().st_size} bytes")


if __name__ == "__main__":
    check(pathlib.Path(sys.argv[1]))
