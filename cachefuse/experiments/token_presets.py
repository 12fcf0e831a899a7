"""The papers' experiments with token features: where to fuse, and the effect of tuning the text model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cachefuse.errors import ConfigError
from cachefuse.experiments.recipe import Recipe, fit_loss
from cachefuse.experiments.recipes import SWEEPS
from cachefuse.experiments.results import Curve, Published
from cachefuse.experiments.sweep import Experiment
from cachefuse.feature_spec import IDS, TOKENS
from cachefuse.files import JsonObject
from cachefuse.registry import Options
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TrainingData

# "Where to fuse", figures 16 and 19 to 22, for an encoder and a decoder of 12 layers each.
THESIS_LAYERS = 12
POINTS = (0, 1, 3, 5, 7, 9, 11, 12)  # layers at which images join
DECODERS = (1, 2, 4, 8, 12)  # layers of the decoder
POOLINGS = ("", "mean:14", "attention:14", "mean:1", "attention:1")
WITH_EVERY_DECODER = ("", "attention:14")  # figures 16 and 22; the others have one decoder: figure 19's, the deepest
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

    The thesis's layers are scaled to those of the model: with a T5, to its own. Options of the base that the experiment
    varies, pool and decoder_layers, leave the others out. A T5 writes the answer if rows have one each.

    Raises ConfigError for a store without tokens of images and texts.
    """
    given = base.fusion_options
    view = IDS if given.get("t5") else TOKENS
    n_tokens = max((s.n_tokens for s in data.specs.values() if (s.modality, s.view) == ("image", TOKENS)), default=0)
    if not n_tokens or not any((s.modality, s.view) == ("text", view) for s in data.specs.values()):
        raise ConfigError(
            f"where-to-fuse needs tokens of images and {view} of texts, but {data.name} lacks them; extract them first"
        )
    if given.get("t5") and data.task in ("multiclass", "vqa") and base.loss in ("bce", "ce"):
        base = replace(base, fusion_options={"answers": "text", **given})
        base = fit_loss(base, data.task, [data.task])
    depth, decoder_depth = model_layers(data, base)
    layers = sorted({math.floor(point * depth / THESIS_LAYERS + 0.5) for point in POINTS})
    decoders = sorted({min(decoder, decoder_depth) for decoder in DECODERS})
    poolings = [pool for pool in POOLINGS if not pool or int(pool.partition(":")[2]) < n_tokens]
    variants = [(f"image={pool}" if pool else "", n) for pool in poolings
                for n in (decoders if pool in WITH_EVERY_DECODER else decoders[-1:])]  # fmt: skip
    if "pool" in given:
        variants = [(given["pool"], n) for n in decoders]
    if "decoder_layers" in given:
        variants = [(pool, int(given["decoder_layers"])) for pool in dict.fromkeys(pool for pool, _ in variants)]
    settings, curves = [], []
    for pool, n in variants:
        name = f"{str(pool).removeprefix('image=') or f'all {n_tokens}'}, decoder of {n}"
        for layer in layers:
            settings.append(
                {"fusion_options": {"fusion_spec": f"0:text,{layer}:image", "decoder_layers": n, "pool": pool}}
            )
            curves.append(Curve(name, "the layer at which images join", layer))
    labels = [f"{curve.name}, at {curve.x:g}" for curve in curves]
    return Experiment(base, settings, "where to fuse images", costs=True, labels=labels, curves=curves)


def model_layers(data: TrainingData, base: TrainConfig) -> tuple[int, int]:
    """Return the numbers of layers of the encoder, and at most of the decoder: a T5's own, or both the depth."""
    architecture: JsonObject | None = data.resolve(base).fusion_options["architecture"]
    if architecture:
        return architecture["num_layers"], architecture["num_decoder_layers"]
    depth: int = data.resolve(base).fusion_options["depth"]
    return depth, depth


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

    recipe: Recipe
    make: Callable[[TrainingData, TrainConfig], Experiment]
    reads: Sequence[Options] = ()


TOKEN_PRESETS = {
    "cma-irrelevant": TokenPreset(SWEEPS["cma-irrelevant"], irrelevant),
    "lit-table": TokenPreset(SWEEPS["lit-table"], lit_table, [setting for _, setting, _ in LIT_TABLE]),
    "where-to-fuse": TokenPreset(SWEEPS["where-to-fuse"], where_to_fuse),
}
