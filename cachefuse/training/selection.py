"""Selecting a store's features and views, and opening them as a table."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from cachefuse.data.dataset import dataset_options
from cachefuse.data.manifest import MULTITASK, VQA
from cachefuse.data.targets import is_labelled
from cachefuse.encoders.base import EncoderSpec, is_derived, is_path
from cachefuse.errors import CacheError, ConfigError
from cachefuse.feature_spec import FLAT, IDS, NGRAMS, POOLED, TOKENS, FeatureSpec
from cachefuse.printable import listed
from cachefuse.store.features import Features
from cachefuse.store.rows import FeatureRows, FlatTokens, JoinedRows
from cachefuse.store.store import FeatureStore
from cachefuse.store.tokens import Tokens
from cachefuse.training.feature_table import AnswerTargets, FeatureTable, multi_hot

Views = Callable[[str], Collection[str]]  # modality -> its views to read


def pooled(modality: str) -> tuple[str, ...]:
    """Return the views of a modality: pooled features only."""
    return (POOLED,)


def one_view(view: str) -> Views:
    """Return ``Views`` with one view for every modality."""
    return lambda modality: (view,)


def stored_views(views: Iterable[str]) -> list[str]:
    """Return the stored view for each view to read; flat features are built from tokens."""
    return [TOKENS if view == FLAT else view for view in views]


def with_view(group: Iterable[Features], view: str) -> list[Features]:
    """Return the features that have a view to read, or were asked for it."""
    (stored,) = stored_views([view])
    return [features for features in group if stored in _has(features)]


def _has(features: Features) -> set[str]:
    return {*features.views, *features.asked}


def select_features(
    store: FeatureStore, encoders: Sequence[str] = (), views: Views = pooled
) -> dict[str, list[Features]]:
    """Return the features to use, by modality: of the named encoders, or of all with complete views.

    An encoder needs all views but n-grams, which are read from those that have them; no error if none has. Aligned
    features are derived from others. They are used only by name, or if there are no others. An encoder's name may be
    its spec, its file or folder, or a substring that fits only one encoder. Raises CacheError if there are no features,
    if a view or a modality is missing, or if rows of the default encoders are: none is ever left out by itself. Raises
    ConfigError for a name that fits no encoder or several.
    """
    candidates = list(store.features())
    if encoders and candidates:
        candidates = [features for name in encoders for features in _find(candidates, name)]
    for (encoder, modality), reason in store.lost_features().items():
        if not encoders or any(features.encoder == encoder for features in candidates):
            raise CacheError(f"{encoder} ({modality}) was asked for, and {reason}")
    needed = {features.modality: stored_views(views(features.modality)) for features in candidates}
    stored = [f for f in candidates if _reads(f, needed[f.modality]) or not needed[f.modality]]
    for modality in needed:
        if not any(features.modality == modality for features in stored) and {TOKENS, IDS} & set(views(modality)):
            of_modality = [features for features in candidates if features.modality == modality]
            raise _missing_views(store, modality, of_modality, needed[modality])
    if not stored:
        view = next((name for names in needed.values() for name in names), POOLED)
        if candidates and all(_has(features) == {NGRAMS} for features in candidates):
            raise CacheError(
                f"{store.path} has only the n-grams of {listed(features.encoder for features in candidates)}, not the "
                f"{view} features that this reads; add them: "
                f"cachefuse extract {dataset_options(store.dataset)} --encoder classic"
            )
        option = "" if view == POOLED else f" --views pooled,{view}"
        raise CacheError(f"{store.path} has no {view} features; run cachefuse extract{option} first")
    if not encoders:
        stored = [features for features in stored if not is_derived(features.encoder)] or stored
        _check_complete(stored, needed)
    chosen: dict[str, list[Features]] = {}
    for features in stored:
        if features not in chosen.setdefault(features.modality, []):
            chosen[features.modality].append(features)
    return dict(sorted(chosen.items()))


def _reads(features: Features, views: Sequence[str]) -> list[str]:
    """Return the views, of those needed, to read from an encoder: all of them, or the n-grams that it has."""
    has = _has(features)
    needed = set(views) - {NGRAMS}
    return [view for view in views if view in has and (view == NGRAMS or needed <= has)]


def _check_complete(stored: Sequence[Features], needed: Mapping[str, Sequence[str]]) -> None:
    """Raise CacheError for features that lack rows, with what to do."""
    read = {id(features): _reads(features, needed[features.modality]) for features in stored}
    complete = {f.encoder for f in stored if all(f.is_complete(view) for view in read[id(f)])}
    for features in stored:
        for view in read[id(features)]:
            if not features.is_complete(view):
                others = sorted(complete - {features.encoder})
                named = "".join(f" --encoder {name}" for name in others)
                without = f", or leave it out:{named}" if others else ""
                raise CacheError(f"{features.not_whole(view)}{without}")


def _find(stored: Sequence[Features], name: str) -> list[Features]:
    names = sorted({features.encoder for features in stored})
    short = Path(name).name if is_path(name) else EncoderSpec.parse(name).short
    exact = {f.encoder for f in stored if f.encoder == short or f.source == name}
    matches = sorted(exact) or [full for full in names if short in full]
    if len(matches) != 1:
        problem = "fits several encoders" if matches else "is not in this store"
        raise ConfigError(f"encoder {name!r} {problem}; choose from: {listed(names)}")
    return [features for features in stored if features.encoder == matches[0]]


def _missing_views(store: FeatureStore, modality: str, stored: Sequence[Features], views: Sequence[str]) -> CacheError:
    """Return the error for features of a modality without the views to read."""
    stored = [features for features in stored if _has(features) != {NGRAMS}]
    has_tokens = [features for features in stored if not is_derived(features.encoder) and features.encoder != "classic"]
    encoders = " ".join(f"--encoder {features.source}" for features in has_tokens) or "--encoder clip:ViT-B-32"
    views = [view for view in views if view != NGRAMS]
    missing = sorted(view for view in views if not stored or any(view not in features.views for features in stored))
    all_views = dict.fromkeys([*(view for features in (has_tokens or stored)[:1] for view in features.views), *views])
    float32 = any(features.provenance.get("dtype") == "float32" for features in has_tokens)
    dtype = " --dtype float32" if float32 else ""
    return CacheError(
        f"{store.path} has no {' and '.join(missing)} of {modality}; make them with cachefuse extract "
        f"{dataset_options(store.dataset)} {encoders} --views {','.join(all_views)}{dtype}"
    )


def load_table(
    store: FeatureStore,
    chosen: Mapping[str, Sequence[Features]],
    views: Views = pooled,
    n_tokens: Mapping[str, int] | None = None,
) -> FeatureTable:
    """Open the ``views`` of the chosen features; features of several encoders are concatenated along the width.

    Flat tokens are side by side: the number of the longest sample, or ``n_tokens`` by modality. Raises ConfigError if
    samples have several items of a modality (captions), or if tokens come from several encoders. Raises CacheError if
    rows are missing.
    """
    features: dict[str, FeatureRows | Tokens] = {}
    specs: dict[str, FeatureSpec] = {}
    sources: dict[str, torch.Tensor] = {}
    for modality, group in chosen.items():
        shared = store.shared_rows(modality)
        if store.has_several(modality):
            raise ConfigError(f"{store.dataset} has several {modality}s per sample; a head reads one: leave them out")
        for view in views(modality):
            readers = with_view(group, view)
            if not readers and NGRAMS in views(modality):  # n-grams, or the others, may be alone
                continue
            x = _open_view(store, modality, view, readers or group, (n_tokens or {}).get(modality, 0))
            spec = _spec_of(modality, view, x)
            if spec.name in specs:
                raise ConfigError(_same_name(store, specs[spec.name], spec))
            features[spec.name], specs[spec.name] = x, spec
            if shared is not None:
                sources[spec.name] = torch.from_numpy(shared)
    return FeatureTable(
        features=features,
        specs=specs,
        present={name: torch.from_numpy(store.present(spec.modality)) for name, spec in specs.items()},
        targets=_targets(store),
        labelled=is_labelled(store.targets),
        splits=store.splits,
        sources=sources,
    )


def _open_view(
    store: FeatureStore, modality: str, view: str, group: Sequence[Features], n_tokens: int
) -> FeatureRows | Tokens:
    """Open one view of a modality's features, from one or more encoders."""
    by_encoder = [features.rows(*stored_views([view])) for features in group]
    if view == POOLED:
        return by_encoder[0] if len(by_encoder) == 1 else JoinedRows(by_encoder)
    if len(by_encoder) > 1:
        raise ConfigError(f"{store.dataset} has {modality} tokens of several encoders; name one with --encoder")
    rows = by_encoder[0]
    return FlatTokens(rows, n_tokens) if view == FLAT else Tokens(rows, group[0].views[view].vocabulary)


def _spec_of(modality: str, view: str, x: FeatureRows | Tokens) -> FeatureSpec:
    width = x.shape[1] if len(x.shape) == 2 else 0  # ids have none
    if isinstance(x, Tokens):
        return FeatureSpec(modality, view, width, x.n_tokens, x.vocabulary)
    parts = tuple(rows.shape[1] for rows in x.encoder_rows) if isinstance(x, JoinedRows) else ()
    return FeatureSpec(modality, view, width, x.n_tokens if isinstance(x, FlatTokens) else 0, parts=parts)


def _same_name(store: FeatureStore, *specs: FeatureSpec) -> str:
    views = " and ".join(f"the {spec.view} of {spec.modality!r}" for spec in specs)
    return f"{store.dataset}: {views} would both have the name {specs[0].name!r}; rename one of the modalities"


def _targets(store: FeatureStore) -> torch.Tensor | AnswerTargets:
    if store.manifest.task == VQA:
        return AnswerTargets(torch.from_numpy(store.targets), len(store.classes))
    several = store.manifest.task == MULTITASK
    return torch.from_numpy(store.targets if several else multi_hot(store.targets, len(store.classes)))
