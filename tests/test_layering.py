"""Imports point one way: a module may import its own layer and those before it, and nothing goes round in a circle.

All imports count: at the top of a module, in functions, for type checkers alone, and the "module:attribute" strings by
which registries name what they import later. Only a package may name its own modules, and the public API all.
"""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import cachefuse

PACKAGE = Path(cachefuse.__file__).parent
LAYERS = (
    "errors",
    "registry",
    "feature_spec",
    "settings",
    "files",
    "workspace",
    "device",
    "threads",
    "metrics",
    "data",
    "encoders",
    "store",
    "extraction",
    "nn",
    "fusion",
    "training",
    "runs",
    "experiments",
    "alignment",
    "report",
    "bench",
    "classifier",
)
HEAVY = {
    "PIL", "h5py", "numpy", "open_clip", "pyarrow", "pydantic", "sklearn", "timm", "torch", "torchvision",
    "transformers", "zarr",
}  # fmt: skip


def name_of(path):
    parts = ("cachefuse", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_by(node):
    """Yield the modules that the code under a node imports, or names to be imported later."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            yield submodule if submodule in FILES else node.module
    else:
        for child in ast.iter_child_nodes(node):
            yield from imported_by(child)


def named_by(node):
    """Yield the modules that a file names as "module:attribute", to be imported later."""
    strings = (x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and isinstance(x.value, str))
    yield from (named[1] for text in strings if (named := re.fullmatch(r"(\w+(?:\.\w+)+):\w+", text)))


def imports_of(name, path):
    """Return the modules that one imports or names. A package's tables may name its own modules, which import it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = f"{name}." if path.name == "__init__.py" else None
    named = {module for module in named_by(tree) if own is None or not module.startswith(own)}
    if name == "cachefuse":  # the public API, for type checkers and for all others
        return named | {module for module in imported_by(tree) if not module.startswith(own)}
    return named | set(imported_by(tree))


IMPORTS = {name: imports_of(name, path) for name, path in FILES.items()}


def layer(name):
    """Return a module's place in the order; the package itself, which names the public API, comes last."""
    if name == "cachefuse":
        return len(LAYERS)
    top = name.split(".")[1]
    assert top in LAYERS, f"cachefuse.{top} is in no layer; put it into LAYERS"
    return LAYERS.index(top)


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name):
    ours = {module for module in IMPORTS[name] if module.split(".")[0] == "cachefuse"}
    assert ours <= FILES.keys()
    assert [module for module in sorted(ours) if layer(module) > layer(name)] == []


@pytest.mark.parametrize("name", FILES)
def test_the_library_does_not_know_its_command_line(name):
    assert {"cachefuse_cli", "cli", "rich", "typer"}.isdisjoint(module.split(".")[0] for module in IMPORTS[name])


def test_there_are_no_cycles():
    graph = {name: {module for module in modules if module in FILES} for name, modules in IMPORTS.items()}
    order = list(TopologicalSorter(graph).static_order())
    assert len(order) == len(FILES)


def test_the_walk_sees_every_kind_of_import():
    code = """
from typing import TYPE_CHECKING
import a.b, c
if TYPE_CHECKING:
    import for_types
else:
    import d
TABLE = {"x": "cachefuse.data.dataset:Dataset", "y": "no: module", "z": Family("p.q:r")}
def f():
    try:
        from cachefuse import errors
    except ImportError:
        from e import g
class C:
    with x:
        import h
"""
    tree = ast.parse(code)
    found = {*imported_by(tree), *named_by(tree)}
    assert found == {
        "typing",
        "a.b",
        "c",
        "for_types",
        "d",
        "cachefuse.data.dataset",
        "p.q",
        "cachefuse.errors",
        "e",
        "h",
    }


@pytest.mark.parametrize(
    "module",
    [
        "cachefuse",
        "cachefuse_cli.app; cachefuse_cli.app.build_app()",
        "cachefuse.registry",
        "cachefuse.files",
        "cachefuse.metrics",
        "cachefuse.threads",
    ],
)
def test_importing_is_light(module):
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
