"""The settings of "Context-Based Multimodal Fusion" (CBMF), with the place of each.

Where the paper states nothing, values are those of its authors' later code, LightCRL.
"""

from cachefuse.experiments.recipe import Chosen, Recipe, Stated

LATER_CODE = "not stated; as in the authors' later code"
CBMF_PAPER = Recipe(
    "Context-Based Multimodal Fusion",
    "section IV-A: a Deep Fusion Encoder on frozen encoders",
    (
        Stated("method", "dfe", "section III"),
        Stated("op", "add", "section IV-C; dot-attention there too, additive-attention in section IV-B"),
        Stated("targets", "soft", "equations 5 and 6, read as a division by 2 tau"),
        Stated("epochs", 500, "section IV-A"),
        Stated("monitor", "loss", "section IV-A: early stopping based on validation loss"),
    ),
    (
        Chosen("views", "pooled", "not stated; attention needs --views tokens"),
        Chosen("patience", 5, LATER_CODE),
        Chosen("width", 256, LATER_CODE),
        Chosen("dropout", 0.1, LATER_CODE),
        Chosen("optimizer", "adamw", LATER_CODE),
        Chosen("lr", 1e-3, LATER_CODE),
        Chosen("weight_decay", 1e-3, LATER_CODE),
        Chosen("decay", "all", LATER_CODE),
        Chosen("batch_size", 64, LATER_CODE),
        Chosen("schedule", "constant", "not stated; the authors' later code lowers the rate on a plateau"),
        Chosen("ema", 0.0, "the paper has none"),
    ),
    {"chunk_size": "the gradient is the same; it saves memory", "seed": "yours"},
    features=(
        Stated("--encoder", "hf:google/vit-base-patch16-224", "section IV-C: ViT, with BERT"),
        Stated("--encoder", "hf:bert-base-uncased", "section IV-B: BERT, with RoBERTa"),
        Stated("--encoder", "hf:roberta-base", "section IV-B"),
        Stated("--dataset", "coco_captions", "section IV"),
        Stated("pairs --threshold", 0.7, "section IV-B"),
    ),
    notes=(
        "Always so: one transformer block with 4 attention heads after LayerNorm, and a residual connection (section "
        "IV-A); a temperature learned as its logarithm (section IV-A), from 0.07, within 0.01 and 1.",
        "g(c) is a learned vector per side; the paper does not state g. Features are standardised, which it does not "
        "mention.",
    ),
)
ALIGNMENTS = {"cbmf-paper": CBMF_PAPER}
