"""The models that a search tries, the most promising ones first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cachefuse.errors import CacheError, ConfigError
from cachefuse.feature_spec import NGRAMS, POOLED, modalities_of
from cachefuse.fusion import FUSIONS
from cachefuse.runs.run import named
from cachefuse.settings import settings_of
from cachefuse.store.store import FeatureStore
from cachefuse.training.build import build_model
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TrainingData, open_training_data
from cachefuse.training.recommended import KEEPS
from cachefuse.training.resolved import ResolvedConfig

MOST_ENCODERS = 6  # of which each is left out in turn


@dataclass(frozen=True)
class Candidate:
    """Settings of a model, and what it reads: ``encoders``, of a ``modality``; () and "" for all."""

    config: TrainConfig
    encoders: tuple[str, ...] = ()
    modality: str = ""
    note: str = ""

    def open(self, store: FeatureStore, device: str) -> tuple[TrainingData, ResolvedConfig]:
        """Open what the model reads, and resolve its settings.

        Raises CacheError or ConfigError if the store lacks features, or the settings do not fit them.
        """
        data = open_training_data(store, self.encoders, device, self.config.reads)
        if self.modality:
            data = data.only([name for name, spec in data.specs.items() if spec.modality == self.modality])
        config = data.resolve(self.config)
        with torch.device("meta"):
            build_model(config, data.specs, len(data.classes), data.tasks)
        return data, config

    def name(self, config: ResolvedConfig) -> str:
        """Return it in words, given its resolved settings: "kernel-ridge-bce bandwidth=2, text alone"."""
        common = TrainConfig(fusion=config.fusion, head=config.head, loss=self.config.loss)
        known = settings_of(TrainConfig)
        changed = [
            f"{setting.option} {setting.text(getattr(self.config, name))}"
            for name, setting in known.items()
            if name not in (*KEEPS, "refit", "fusion_options") and getattr(self.config, name) != getattr(common, name)
        ]
        options = [f"{name} {value}" for name, value in self.config.changed_options().items()]
        return ", ".join([" ".join([named(config), *options, *changed]), *filter(None, [self.note])])


def candidates(store: FeatureStore, base: TrainConfig, encoders: Sequence[str] = ()) -> list[Candidate]:
    """Return the candidates for a store; the first two are those of ``train-head`` without settings.

    ``base`` has the settings of choosing and measuring. ``encoders`` names those to use, by default all.
    """
    one_label = store.manifest.task == "multiclass"
    likelihood, other = ("ce", "focal") if one_label else ("bce", "asl")

    def of(fusion: str, **settings: Any) -> Candidate:
        loss = {} if FUSIONS[fusion].solved else {"loss": likelihood}
        return Candidate(replace(base, fusion=fusion, **{**loss, **settings}), tuple(encoders))

    found = [of("sum"), of("kernel")]
    found += [
        of("logistic", standardize="none"),
        of("sum", loss=other),
        of("kernel", fusion_options={"bandwidth": 2.0}),
    ]
    found += [of("concat"), of("logistic"), of("mixed")]
    modalities, names = _features(store, encoders)
    alone = [
        replace(each, modality=modality, note=f"{modality} alone")
        for modality in (modalities if len(modalities) > 1 else ())
        for each in found[1:4]
    ]
    found += alone
    found += [of("neighbours"), of("prototype")]
    found += [of("concat", loss=other, members=3), of("sum", head="gmlp"), of("sum", head="linear")]
    for name in names if 1 < len(names) <= MOST_ENCODERS else ():
        rest = tuple(x for x in names if x != name)
        found += [replace(each, encoders=rest, note=f"without {name}") for each in found[:2]]
    found += [of("sum", loss=other, members=3), of("gated"), of("kernel", fusion_options={"bandwidth": 0.5})]
    return found


def _features(store: FeatureStore, encoders: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the modalities and the encoders that the kernel reads."""
    data = open_training_data(store, encoders, "cpu", TrainConfig(fusion="kernel").reads)
    readable = {f.encoder: None for group in data.stored.values() for f in group if {POOLED, NGRAMS} & {*f.views}}
    return modalities_of(data.specs.values()), tuple(readable)


def opened(
    tried: Sequence[Candidate], store: FeatureStore, device: str
) -> Iterator[tuple[Candidate, TrainingData, ResolvedConfig]]:
    """Yield the candidates that fit the store, each with its data and its resolved settings.

    Raises the error of the first one if none fits.
    """
    problem, fits = None, False
    for candidate in tried:
        try:
            found = candidate.open(store, device)
        except (CacheError, ConfigError) as error:
            problem = problem or error
            continue
        fits = True
        yield candidate, *found
    if problem is not None and not fits:
        raise problem
