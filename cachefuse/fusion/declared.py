"""What each fusion declares, read from its source: help lists it, and must not wait for torch to be imported.

A fusion's options are the keyword-only arguments of its constructor that say what they are:
``depth: Annotated[int, "transformer blocks"] = 2``. Its ``parts``, ``stages`` and ``defaults`` stand in its class. What
cannot be read this way is left out; a test compares all that there is with the classes themselves.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from cachefuse.fusion import FUSIONS
from cachefuse.registry import Options

HELP = "help"  # in place of options: explain them


@dataclass(frozen=True)
class Option:
    """An option of a fusion; the type of the default is its type."""

    name: str
    default: object
    help: str


@dataclass(frozen=True)
class Declared:
    """What a fusion says of itself; ``defaults`` are settings of a training that differ from those of others."""

    options: tuple[Option, ...] = ()
    parts: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    defaults: Options = field(default_factory=dict)


@cache
def declared(name: str) -> Declared:
    """Return what the fusion of a name declares; nothing for one whose source is not there."""
    module, _, attribute = FUSIONS.source(name).partition(":")
    try:
        spec = find_spec(module)
        tree = ast.parse(Path(str(spec.origin if spec else "")).read_text(encoding="utf-8"))
    except (ImportError, OSError, ValueError, SyntaxError):  # of another package: using the fusion says what is wrong
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
    named = {name: values[name] for name in ("parts", "stages", "defaults") if name in values}
    return Declared(tuple(options), **named)


def _constants(body: Sequence[ast.stmt], known: Options) -> Options:
    """Return the names that statements give to plain values."""
    found = dict(known)
    for statement in body:
        match statement:
            case ast.Assign([target], value) | ast.AnnAssign(target, _, ast.expr() as value):
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                values = value.elts if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) else [value]
                for name, one in zip(names, values, strict=False):
                    if isinstance(name, ast.Name):
                        found[name.id] = _value(one, found)
    return found


def _value(node: ast.expr, known: Options) -> object:
    """Return the value of a literal, of a name that is known, or of a tuple of these; else None."""
    match node:
        case ast.Name(name):
            return known.get(name)
        case ast.Tuple(parts):
            return tuple(_value(part, known) for part in parts)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def list_options() -> str:
    """Return every fusion's options with their defaults, in sentences."""
    options = {name: [f"{o.name} {o.default}".rstrip() for o in declared(name).options] for name in FUSIONS}
    return f"{_listed(options)} {HELP}: explain those of --fusion."


def list_parts() -> str:
    """Return every fusion's parts that can be left out, in a sentence."""
    return _listed({name: list(declared(name).parts) for name in FUSIONS})


def list_stages() -> str:
    """Return the stages of every fusion that has some, in a sentence."""
    return _listed({name: [",".join(declared(name).stages)] * bool(declared(name).stages) for name in FUSIONS})


def defaults_of(setting: str) -> str:
    """Return the defaults that fusions have of their own for a setting, as "cma, midfusion: 0.2; lit: 0.1"."""
    fusions: dict[str, list[str]] = {}
    for name in FUSIONS:
        if setting in declared(name).defaults:
            fusions.setdefault(f"{declared(name).defaults[setting]:g}", []).append(name)
    return "; ".join(f"{', '.join(names)}: {value}" for value, names in fusions.items())


def _listed(names: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{fusion}: {', '.join(own)}" for fusion, own in names.items() if own) + "."
