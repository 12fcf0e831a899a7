"""`cachefuse encoders`."""

import logging

from cachefuse_cli.shared.options import Json

logger = logging.getLogger("cachefuse.cli")


def encoders(json: Json = False) -> None:
    """List the encoder families, with an example for each."""
    from dataclasses import asdict

    from cachefuse.encoders import DEFAULT_ENCODER, FAMILIES
    from cachefuse.errors import PluginError
    from cachefuse_cli.shared import render

    families = {}
    with render.status("looking for encoders"):
        for name in FAMILIES:
            try:
                families[name] = FAMILIES[name]
            except PluginError as error:  # list the other families anyway
                logger.warning("%s", error)
    if json:
        render.print_json({name: asdict(family) for name, family in families.items()})
    else:
        render.encoders(families, DEFAULT_ENCODER)
