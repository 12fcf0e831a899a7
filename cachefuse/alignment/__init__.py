"""Alignment: one space for images and texts, by the Deep Fusion Encoder. Naming the parts imports no torch."""

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
    "mul": "cachefuse.alignment.dfe:Multiply",
}
# Named by an entry point, as another package's encoders are: encoders do not know alignments.
ENCODER_FAMILY = Family(
    "cachefuse.alignment.tower:open_aligned",
    "aligned:./workspace/runs/NAME",
    "image, text",
    "what cachefuse align made of two encoders; after @, of two text encoders, 1 or 2",
)
