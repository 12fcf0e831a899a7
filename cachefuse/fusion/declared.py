"""The options, parts, stages and defaults of each fusion, read from its source: ``--help`` must not import torch.

A fusion's options are the keyword-only arguments of its constructor that have a help text:
``depth: Annotated[int, "transformer blocks"] = 2``. ``parts``, ``stages`` and ``defaults`` are attributes of its class.
Values that are no literals are left out; a test compares the rest with the classes.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from cachefuse.fusion import FUSIONS
from cachefuse.registry import Options
from cachefuse.settings import as_text

HELP = "help"  # the value of --fusion-options that explains them


@dataclass(frozen=True)
class Option:
    """An option of a fusion; its type is the type of its default."""

    name: str
    default: object
    help: str


@dataclass(frozen=True)
class Declared:
    """What a fusion declares; ``defaults`` holds its own defaults of training settings."""

    options: tuple[Option, ...] = ()
    parts: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    defaults: Options = field(default_factory=dict)


@cache
def declared(name: str) -> Declared:
    """Return what the named fusion declares; empty if its source cannot be read."""
    module, _, attribute = FUSIONS.source(name).partition(":")
    try:
        spec = find_spec(module)
        tree = ast.parse(Path(str(spec.origin if spec else "")).read_text(encoding="utf-8"))
    except (Exception, SystemExit):  # of another package, which may raise anything: importing the fusion reports it
        return Declared()
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if attribute not in classes:
        return Declared()
    return _read(classes[attribute], _constants(tree.body, {}))


def _read(node: ast.ClassDef, constants: Options) -> Declared:
    values = _constants(node.body, constants)
    init = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
    options = []
    for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True) if init else ():
        match argument.annotation:
            case ast.Subscript(ast.Name("Annotated"), ast.Tuple([_, ast.Constant(help)])) if default:
                options.append(Option(argument.arg, _value(default, constants), str(help)))
    given = values.get("defaults")
    defaults = {str(k): v for k, v in given.items() if v is not None} if isinstance(given, dict) else {}
    return Declared(tuple(options), _names(values.get("parts")), _names(values.get("stages")), defaults)


def _names(value: object) -> tuple[str, ...]:
    """Return a tuple of names, empty for any other value."""
    return tuple(map(str, value)) if isinstance(value, tuple) and all(isinstance(x, str) for x in value) else ()


def _constants(body: Sequence[ast.stmt], known: Options) -> Options:
    """Return the constants that statements assign, by name, together with the known ones."""
    constants = dict(known)
    for statement in body:
        match statement:
            case ast.Assign([target], value) | ast.AnnAssign(target, _, ast.expr() as value):
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                values = value.elts if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) else [value]
                for name, expression in zip(names, values, strict=False):
                    if isinstance(name, ast.Name):
                        constants[name.id] = _value(expression, constants)
    return constants


def _value(node: ast.expr, known: Options) -> object:
    """Return the value of a literal, of a known name, or of a tuple of these; else None."""
    match node:
        case ast.Name(name):
            return known.get(name)
        case ast.Tuple(elements):
            return tuple(_value(element, known) for element in elements)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def list_options() -> str:
    """Return every fusion's options with their defaults, in sentences."""
    options = {name: [f"{o.name} {o.default}".rstrip() for o in declared(name).options] for name in FUSIONS}
    return f"{_listed(options)} {HELP}: explain the options of --fusion."


def list_parts() -> str:
    """Return the parts that each fusion can leave out, in a sentence."""
    return _listed({name: list(declared(name).parts) for name in FUSIONS})


def list_stages() -> str:
    """Return the stages of each fusion with stages, in a sentence."""
    return _listed({name: [",".join(declared(name).stages)] * bool(declared(name).stages) for name in FUSIONS})


def defaults_of(setting: str) -> str:
    """Return the fusions' own defaults of a setting, as "cma, midfusion: 0.2; lit: 0.1"."""
    fusions: dict[str, list[str]] = {}
    for name in FUSIONS:
        if setting in declared(name).defaults:
            fusions.setdefault(as_text(declared(name).defaults[setting]), []).append(name)
    return "; ".join(f"{', '.join(names)}: {value}" for value, names in fusions.items())


def _listed(names: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{fusion}: {', '.join(listed)}" for fusion, listed in names.items() if listed) + "."
