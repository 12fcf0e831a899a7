"""Fusions map the features of each modality to logits. One file and one line per method; no torch is imported."""

from typing import TYPE_CHECKING

from cachefuse.registry import Registry

if TYPE_CHECKING:
    from cachefuse.fusion.base import Fusion

FUSIONS: "Registry[type[Fusion]]" = Registry(
    "fusion",
    "cachefuse.fusions",
    {
        "cma": "cachefuse.fusion.cma:CMAFusion",
        "concat": "cachefuse.fusion.late:ConcatFusion",
        "gated": "cachefuse.fusion.gated:GatedFusion",
        "image": "cachefuse.fusion.late:ImageOnly",
        "kernel": "cachefuse.fusion.kernel:KernelFusion",
        "lit": "cachefuse.fusion.lit:LiTFusion",
        "logistic": "cachefuse.fusion.logistic:LogisticFusion",
        "midfusion": "cachefuse.fusion.midfusion:MidFusion",
        "mixed": "cachefuse.fusion.late:MixedFusion",
        "neighbours": "cachefuse.fusion.nearest:NeighboursFusion",
        "prototype": "cachefuse.fusion.nearest:PrototypeFusion",
        "sum": "cachefuse.fusion.late:SumFusion",
        "text": "cachefuse.fusion.late:TextOnly",
        "tirg": "cachefuse.fusion.tirg:TIRGFusion",
    },
    base="cachefuse.fusion.base:Fusion",
    has=("name",),
    takes="specs, classes, head",
)
