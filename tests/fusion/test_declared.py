"""What help says of fusions without importing them, against the classes."""

from typing import Annotated, get_args, get_origin, get_type_hints

import pytest

from cachefuse.fusion import FUSIONS
from cachefuse.fusion.base import Fusion
from cachefuse.fusion.declared import declared
from cachefuse.fusion.options import DERIVED_OPTIONS


@pytest.mark.parametrize("name", sorted(FUSIONS))
def test_help_reads_from_the_source_what_the_class_declares(name):
    fusion, read = FUSIONS[name], declared(name)
    hints = get_type_hints(fusion.__init__, include_extras=True)
    said = {key: get_args(hint)[1] for key, hint in hints.items() if get_origin(hint) is Annotated}
    given = {key: default for key, default in fusion.options().items() if key not in DERIVED_OPTIONS}
    assert {option.name: option.default for option in read.options} == given
    assert {option.name: option.help for option in read.options} == said
    assert (read.parts, read.stages, read.defaults) == (fusion.parts, fusion.stages, fusion.defaults)


@pytest.mark.parametrize("name", sorted(FUSIONS))
def test_it_has_weights_to_show_if_it_says_so(name):
    assert FUSIONS[name].weighs == (FUSIONS[name].weights is not Fusion.weights)
