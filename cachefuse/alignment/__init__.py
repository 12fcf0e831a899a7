"""Alignment: one space for images and texts, by the Deep Fusion Encoder. The tables of methods import no torch."""

from cachefuse.encoders import Family

METHODS = {
    "dfe": "cachefuse.alignment.dfe:DeepFusionEncoder",
    "projection": "cachefuse.alignment.dfe:ProjectionEncoder",
}
OPERATIONS = {
    "add": "cachefuse.alignment.dfe:Add",
    "additive-attention": "cachefuse.alignment.dfe:AdditiveAttention",
    "concat": "cachefuse.alignment.dfe:Concat",
    "dot-attention": "cachefuse.alignment.dfe:DotAttention",
    "general-attention": "cachefuse.alignment.dfe:GeneralAttention",
    "mul": "cachefuse.alignment.dfe:Multiply",
}
# An entry point registers it, as for an encoder of another package: cachefuse.encoders does not import alignments.
ENCODER_FAMILY = Family(
    "cachefuse.alignment.tower:open_aligned",
    "aligned:./workspace/runs/NAME",
    "image, text",
    "an alignment of two encoders by cachefuse align; @1 or @2 selects one of two text encoders",
)
