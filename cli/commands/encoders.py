"""`cachefuse encoders`."""

from cachefuse_cli.shared.options import Json


def encoders(json: Json = False) -> None:
    """List the encoder families, with an example for each."""
    from dataclasses import asdict

    from cachefuse.encoders import DEFAULT_ENCODER, FAMILIES
    from cachefuse_cli.shared import render

    if json:
        render.print_json({name: asdict(family) for name, family in FAMILIES.items()})
    else:
        render.encoders(FAMILIES, DEFAULT_ENCODER)
