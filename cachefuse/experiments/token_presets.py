"""The papers' experiments with token features: where to fuse, and the effect of tuning the text model."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cachefuse.errors import ConfigError
from cachefuse.experiments.results import Curve, Published
from cachefuse.experiments.sweep import Experiment
from cachefuse.feature_spec import IDS, TOKENS
from cachefuse.files import JsonObject
from cachefuse.registry import Options
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TrainingData

# "Where to fuse", sections 3.2 and 3.3: kinds and lengths of pooling at every layer, and decoder depths.
POOLINGS = ("", "mean:14", "attention:14", "mean:1", "attention:1")
DECODERS = (1, 2, 4)
MAX_POINTS = 5  # per curve, from the first layer to the last
ABLATIONS: dict[str, tuple[str, ...]] = {
    "cma": (),
    "without modality attention": ("modality-attention",),
    "without sequence attention either": ("modality-attention", "sequence-attention"),
}
SHARES = (0.0, 0.5, 1.0)  # shares of rows with another row's caption
# "Leveraging efficient training and feature fusion", table 1: the datasets' main metrics in per cent.
LIT_TABLE: tuple[tuple[str, JsonObject, dict[str, float]], ...] = (
    ("text", {"fusion": "lit", "ablate": ("image",)}, {"food101": 78.7, "mmimdb": 63.3, "fashiongen": 76.1}),
    ("image", {"fusion": "image"}, {"food101": 73.3, "mmimdb": 48.6, "fashiongen": 31.8}),
    ("as MMBT", {"fusion": "lit", "ablate": ("tirg",), "fusion_options": {"grid": 3}},
     {"food101": 86.5, "mmimdb": 64.7, "fashiongen": 81.8}),
    ("without TIRG", {"fusion": "lit", "ablate": ("tirg",)}, {"food101": 91.0, "mmimdb": 67.4, "fashiongen": 82.6}),
    ("full", {"fusion": "lit"}, {"food101": 92.2, "mmimdb": 68.6, "fashiongen": 83.3}),
)  # fmt: skip


def where_to_fuse(data: TrainingData, base: TrainConfig) -> Experiment:
    """Return the experiment of the thesis's curves: score and steps per second by the layer at which images join.

    Raises ConfigError for a store without tokens of images and texts.
    """
    view = IDS if base.fusion_options.get("t5") else TOKENS
    n_tokens = max((s.n_tokens for s in data.specs.values() if (s.modality, s.view) == ("image", TOKENS)), default=0)
    if not n_tokens or not any((s.modality, s.view) == ("text", view) for s in data.specs.values()):
        raise ConfigError(
            f"where-to-fuse needs tokens of images and {view} of texts, but {data.name} lacks them; extract them first"
        )
    architecture: JsonObject = data.resolve(base).fusion_options["architecture"] or {}
    from_scratch: int = base.fusion_options.get("depth", 4)
    depth: int = architecture.get("num_layers", from_scratch)
    layers = sorted({round(i * depth / (MAX_POINTS - 1)) for i in range(MAX_POINTS)})
    variants = [(pool, 1) for pool in POOLINGS if not pool or int(pool.partition(":")[2]) < n_tokens]
    variants += [("attention:14", decoder) for decoder in DECODERS[1:] if n_tokens > 14]
    settings, curves = [], []
    for pool, decoder in variants:
        name = f"{pool or f'all {n_tokens}'}" + (f", {decoder} decoder layers" if decoder > 1 else "")
        for layer in layers:
            options = {"fusion_spec": f"0:text,{layer}:image", "decoder_layers": decoder}
            settings.append({"fusion_options": {**options, "pool": f"image={pool}" if pool else ""}})
            curves.append(Curve(name, "the layer at which images join", layer))
    labels = [f"{curve.name}, at {curve.x:g}" for curve in curves]
    return Experiment(base, settings, "where to fuse images", costs=True, labels=labels, curves=curves)


def lit_table(data: TrainingData, base: TrainConfig) -> Experiment:
    """Return the experiment of table 1: only texts, only images, and both, with and without parts of the method."""
    labels, settings, figures = zip(*LIT_TABLE, strict=True)
    published: Sequence[Published | None] = [
        (round(by_dataset[data.name] / 100, 6), math.nan) if data.name in by_dataset else None for by_dataset in figures
    ]
    paper = "paper: accuracy of food101, micro-F1 of mmimdb and fashiongen, with BERT and CLIP ViT-B/32"
    shown = tuple(dict.fromkeys((data.metric, "macro_f1", "macro_ap")))
    return Experiment(
        base, settings, "locked image, tuned text", published, costs=True, labels=labels, paper=paper, shown=shown
    )


def irrelevant(data: TrainingData, base: TrainConfig) -> Experiment:
    """Return the experiment of cma with and without its attentions, with wrong captions for a share of the rows.

    It imitates CMA-CLIP, section 4, where some product titles mention no colour or pattern.
    """
    settings = [{"ablate": ablate, "shuffle": {"text": share}} for share in SHARES for ablate in ABLATIONS.values()]
    labels = [f"{share:.0%}: {name}" for share in SHARES for name in ABLATIONS]
    return Experiment(base, settings, "captions shuffled among a share of rows", labels=labels)


@dataclass(frozen=True)
class TokenPreset:
    """``make(data, base)`` returns the experiment; ``reads`` are settings that read other views than the base."""

    base: TrainConfig
    make: Callable[[TrainingData, TrainConfig], Experiment]
    reads: Sequence[Options] = ()


TOKEN_PRESETS = {
    "cma-irrelevant": TokenPreset(TrainConfig(fusion="cma", epochs=10), irrelevant),
    "lit-table": TokenPreset(TrainConfig(fusion="lit"), lit_table, [setting for _, setting, _ in LIT_TABLE]),
    "where-to-fuse": TokenPreset(TrainConfig(fusion="midfusion", epochs=5), where_to_fuse),
}
RECIPES: Mapping[str, TrainConfig] = {
    "cma-paper": TrainConfig(
        fusion="cma", fusion_options={"depth": 12, "width": 512, "heads": 8}, lr=1e-5, weight_decay=1e-4,
        batch_size=1024, epochs=100,
    ),  # CMA-CLIP, section 3.2, warm-up stage
    "lit-paper": TrainConfig(fusion="lit", lr=5e-5, batch_size=128, epochs=30),  # section 4.1
}  # fmt: skip
