"""Imports point one way: a module may import its own layer and those before it, and nothing goes round in a circle.

All imports count: at the top of a module, in functions, for type checkers alone, and the strings that name a module,
"module:attribute" in registries or a module alone. Only a package may name its own modules, and the public API all.
"""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import cachefuse
import cachefuse_cli

PACKAGE, COMMAND_LINE = Path(cachefuse.__file__).parent, Path(cachefuse_cli.__file__).parent
LAYERS = (
    "errors",
    "printable",
    "registry",
    "feature_spec",
    "settings",
    "temporary",
    "files",
    "output",
    "csv_writer",
    "limits",
    "memory",
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
CLI_LAYERS = ("shared", "commands", "app")
HEAVY = {
    "PIL", "h5py", "numpy", "open_clip", "pyarrow", "pydantic", "sklearn", "timm", "torch", "torchvision",
    "transformers", "zarr",
}  # fmt: skip


def files_of(name, folder):
    """Return the files of a package by module."""
    files = {}
    for path in sorted(folder.rglob("*.py")):
        parts = (name, *path.relative_to(folder).with_suffix("").parts)
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES, CLI_FILES = files_of("cachefuse", PACKAGE), files_of("cachefuse_cli", COMMAND_LINE)
ALL_FILES = {**FILES, **CLI_FILES}


def imported_by(node):
    """Yield the modules that the code under a node imports, or names to be imported later."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            yield submodule if submodule in ALL_FILES else node.module
    else:
        for child in ast.iter_child_nodes(node):
            yield from imported_by(child)


def named_by(node):
    """Yield the modules that a file names as "module:attribute", or in full, to be imported later."""
    for text in strings_in(node):
        if named := re.fullmatch(r"(\w+(?:\.\w+)*):\w+", text):
            yield named[1]
        elif "." in text and text in ALL_FILES:
            yield text


def strings_in(node):
    return (x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and isinstance(x.value, str))


def imports_of(name, path):
    """Return the modules that one imports or names. A package's tables may name its own modules, which import it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = f"{name}." if path.name == "__init__.py" else None
    named = {module for module in named_by(tree) if own is None or not f"{module}.".startswith(own)}
    if name == "cachefuse":  # the public API, for type checkers and for all others
        return named | {module for module in imported_by(tree) if not module.startswith(own)}
    return named | set(imported_by(tree))


IMPORTS = {name: imports_of(name, path) for name, path in ALL_FILES.items()}


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
    graph = {name: {module for module in modules if module in ALL_FILES} for name, modules in IMPORTS.items()}
    order = list(TopologicalSorter(graph).static_order())
    assert len(order) == len(ALL_FILES)


@pytest.mark.parametrize("name", CLI_FILES)
def test_commands_do_not_know_each_other(name):
    """``shared`` knows no command, and a command no other."""
    place = CLI_LAYERS.index(name.split(".")[1]) if "." in name else 0
    above = {f"cachefuse_cli.{layer}" for layer in CLI_LAYERS[place:] if layer != "shared"}
    ours = {module for module in IMPORTS[name] if module.startswith("cachefuse_cli")}
    assert [module for module in ours if ".".join(module.split(".")[:2]) in above] == []


@pytest.mark.parametrize("name", FILES)
def test_imports_can_be_read(name):
    """Only the registry imports by a name, and no name is put together from pieces, which this file would not see."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    called = {getattr(x.func, "attr", getattr(x.func, "id", "")) for x in ast.walk(tree) if isinstance(x, ast.Call)}
    plain = {x.func.id for x in ast.walk(tree) if isinstance(x, ast.Call) and isinstance(x.func, ast.Name)}
    assert name == "cachefuse.registry" or not called & {"import_module", "__import__"}
    assert not plain & {"exec", "eval"}
    assert [text for text in strings_in(tree) if re.fullmatch(r"cachefuse[\w.]*\.|\.[\w.]+:\w+", text)] == []


def test_the_walk_sees_every_kind_of_import():
    code = """
from typing import TYPE_CHECKING
import a.b, c
if TYPE_CHECKING:
    import for_types
else:
    import d
TABLE = {"x": "cachefuse.data.dataset:Dataset", "y": "no: module", "z": Family("p.q:r"), "a": "cachefuse:train_head"}
LOGGER = logging.getLogger("cachefuse.training.loop")
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
        "cachefuse",
        "cachefuse.training.loop",
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
