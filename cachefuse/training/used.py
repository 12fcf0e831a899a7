"""The features that a run reads: described in its file, and found again in a store."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cachefuse.cache.features import Features
from cachefuse.cache.rows import TokenWidth
from cachefuse.cache.store import FeatureStore
from cachefuse.cache.tokens import SequenceWidth
from cachefuse.errors import RunError
from cachefuse.fusion.base import modalities_of, split_name
from cachefuse.registry import FLAT, POOLED, lookup
from cachefuse.runtime import resolve_device
from cachefuse.training.batches import FeatureTable
from cachefuse.training.selection import load_table

if TYPE_CHECKING:
    from cachefuse.training.run import Member, Run


@dataclass(frozen=True)
class UsedFeatures:
    """One encoder's features that a run was trained on; ``source`` opens the encoder again.

    ``tokens`` is the most tokens that a sample had, 0 for pooled features; where those lie side by side in the width,
    in place of pooled features, just so many.
    """

    encoder: str
    source: str
    key: str
    dtype: str
    width: int
    tokens: int = 0


UsedByName = dict[str, tuple[UsedFeatures, ...]]


def read_view(name: str, used: UsedFeatures) -> str:
    """Return which view is read of features that go by a name."""
    view = split_name(name)[1]
    return FLAT if view == POOLED and used.tokens else view


def used_features(chosen: Mapping[str, Sequence[Features]], widths: Mapping[str, int]) -> UsedByName:
    """Describe the features, chosen by modality, that a run is trained on, of the given widths by name."""

    def describe(f: Features, width: int) -> UsedFeatures:
        tokens = getattr(width, "n_tokens", 0)
        return UsedFeatures(
            encoder=f.encoder,
            source=f.source,
            key=f.key,
            dtype=f.provenance["dtype"],
            width=int(width) if tokens else f.views[POOLED].row_shape[0],
            tokens=tokens,
        )

    return {name: tuple(describe(f, width) for f in chosen[split_name(name)[0]]) for name, width in widths.items()}


def widths_of(features: UsedByName) -> dict[str, int]:
    """Return the widths of a run's features by name. Raises RunError for tokens of several encoders, or not whole."""
    return {name: _width_of(name, group) for name, group in features.items()}


def _width_of(name: str, group: Sequence[UsedFeatures]) -> int:
    if split_name(name)[1] != POOLED:
        if len(group) != 1 or group[0].tokens < 1:
            raise RunError(f"{name} must be of one encoder, with the most tokens that a sample has")
        return SequenceWidth(group[0].width, group[0].tokens)
    width, tokens = sum(used.width for used in group), group[0].tokens if group else 0
    if tokens and (len(group) > 1 or tokens < 0 or width % tokens):
        raise RunError(f"{width} numbers a sample are not {tokens} tokens of one encoder")
    return TokenWidth(width, tokens) if tokens else width


def match_features(run: "Run", used: UsedByName, store: FeatureStore) -> dict[str, list[Features]]:
    """Return a store's features that a run's member reads, by modality.

    Raises RunError if the store has others or none.
    """
    if store.classes != run.classes:
        raise RunError(f"run {run.name} was trained on other classes than {store.path} has now; train again")
    matched: dict[str, list[Features]] = {}
    for name, group in used.items():
        modality = split_name(name)[0]
        for one in group:
            features = store.open_features(one.encoder, modality)
            if features is None:
                raise RunError(f"run {run.name} was trained on {one.encoder} ({modality}), which {store.path} lacks")
            if features.key != one.key:
                raise RunError(
                    f"run {run.name} was trained on another store: its {one.encoder} ({modality}) features were made "
                    f"differently from those in {store.path}; train again, or take the store it was trained on"
                )
            group_so_far = matched.setdefault(modality, [])
            if one.encoder not in [other.encoder for other in group_so_far]:  # of which several views are read
                group_so_far.append(features)
    return matched


class StoreTables:
    """A store's features as runs' members read them; raises RunError if a run was trained on another store.

    Members that read the same share one table.
    """

    def __init__(
        self, runs: "Sequence[Run]", store: FeatureStore, device: str = "auto", without: Collection[str] = ()
    ) -> None:
        """``without`` names modalities to take as absent; UnknownNameError for one that a run does not read."""
        self._tables: dict[Any, FeatureTable] = {}
        for run in runs:
            for modality in without:
                lookup(dict.fromkeys(run.modalities), modality, "modality")
            for member in run.members:
                if self._key(member) not in self._tables:
                    table = open_table(run, member.features, store)
                    gone = [modality for modality in modalities_of(table.present) if modality in without]
                    self._tables[self._key(member)] = table.without(gone).to(resolve_device(device))

    def __call__(self, member: "Member") -> FeatureTable:
        return self._tables[self._key(member)]

    def _key(self, member: "Member") -> tuple[Any, ...]:
        return tuple(member.features.items())


def open_table(run: "Run", used: UsedByName, store: FeatureStore) -> FeatureTable:
    """Open a store's features as a run's member reads them. Raises RunError if the store has others or none."""
    chosen = match_features(run, used, store)
    read: dict[str, list[str]] = {}
    for name, group in used.items():
        read.setdefault(split_name(name)[0], []).append(read_view(name, group[0]))
    n_tokens = {name: group[0].tokens for name, group in used.items()}
    return load_table(store, chosen, read.__getitem__, n_tokens)
