import subprocess
import sys
from decimal import Decimal
from typing import Any

import pytest

from cachefuse.errors import CachefuseError, UnknownNameError
from cachefuse.fusion import FUSIONS
from cachefuse.metrics import METRICS
from cachefuse.nn import ACTIVATIONS, HEADS, LOSSES
from cachefuse.nn.losses import REDUCTIONS
from cachefuse.registry import import_entry, lookup
from fixtures.messages import naming

TABLES: dict[str, Any] = {
    "activation": ACTIVATIONS,
    "fusion": FUSIONS,
    "head": HEADS,
    "loss": LOSSES,
    "metric": METRICS,
    "reduction": REDUCTIONS,
}


def test_returns_an_entry_as_it_is():
    entry = object()
    assert lookup({"one": entry}, "one", "thing") is entry


def test_imports_only_what_is_asked_for():
    table = {"decimal": "decimal:Decimal", "broken": "no_such_module:nothing"}
    assert lookup(table, "decimal", "number") is Decimal
    assert table["decimal"] == "decimal:Decimal"
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        lookup(table, "broken", "number")


def test_resolve():
    assert import_entry("decimal:Decimal") is Decimal
    assert import_entry(7) == 7


def test_unknown_name_lists_the_choices():
    with pytest.raises(UnknownNameError, match=naming("fusion zzz concat mixed sum")):
        lookup({"sum": 1, "mixed": 2, "concat": 3}, "zzz", "fusion")


def test_unknown_name_suggests_the_closest():
    with pytest.raises(UnknownNameError, match=naming("fusion smu sum")):
        FUSIONS["smu"]


def test_unknown_name_is_a_lookup_error():
    assert issubclass(UnknownNameError, LookupError)
    assert issubclass(UnknownNameError, CachefuseError)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, table in TABLES.items() for name in table])
def test_every_entry_resolves(kind, name):
    assert callable(lookup(TABLES[kind], name, kind))


@pytest.mark.parametrize("kind", TABLES)
def test_tables_are_in_alphabetical_order(kind):
    assert list(TABLES[kind]) == sorted(TABLES[kind])


def test_listing_names_imports_nothing_heavy():
    modules = "cachefuse.fusion, cachefuse.metrics, cachefuse.registry"
    code = f"import sys, {modules}; print({{'numpy', 'sklearn', 'torch'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
