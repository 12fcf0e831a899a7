"""The version is stated once, in pyproject.toml; everything that says it says the same."""

import tomllib
from importlib.metadata import version
from pathlib import Path

import cachefuse

ROOT = Path(__file__).parents[1]


def test_the_installed_version_is_the_one_that_pyproject_states() -> None:
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert version("cachefuse") == cachefuse.__version__ == stated, "install again: pip install -e ."


def test_no_module_states_the_version_again() -> None:
    sources = [path for folder in ("cachefuse", "cli") for path in (ROOT / folder).rglob("*.py")]
    assert sources
    assert not [path for path in sources if f'"{cachefuse.__version__}"' in path.read_text(encoding="utf-8")]


def test_the_package_carries_its_types() -> None:
    assert (Path(cachefuse.__file__).parent / "py.typed").is_file()
