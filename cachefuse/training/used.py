"""The features that a run reads: described in its file, and found again in a store."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cachefuse.cache.features import Features
from cachefuse.cache.rows import TokenWidth
from cachefuse.cache.store import FeatureStore
from cachefuse.errors import RunError
from cachefuse.registry import lookup
from cachefuse.runtime import resolve_device
from cachefuse.training.batches import FeatureTable, load_table

if TYPE_CHECKING:
    from cachefuse.training.run import Member, Run


@dataclass(frozen=True)
class UsedFeatures:
    """One encoder's features that a run was trained on; ``source`` opens the encoder again.

    ``tokens`` is the number of tokens that lie side by side in their width, 0 for pooled features.
    """

    encoder: str
    source: str
    key: str
    dtype: str
    width: int
    tokens: int = 0

    @property
    def view(self) -> str:
        return "tokens" if self.tokens else "pooled"


UsedByModality = dict[str, tuple[UsedFeatures, ...]]


def used_features(chosen: Mapping[str, Sequence[Features]], widths: Mapping[str, int]) -> UsedByModality:
    """Describe the features that a run is trained on, of the given widths by modality."""

    def describe(f: Features, width: int) -> UsedFeatures:
        tokens = width.n_tokens if isinstance(width, TokenWidth) else 0
        return UsedFeatures(
            encoder=f.encoder,
            source=f.source,
            key=f.key,
            dtype=f.provenance["dtype"],
            width=int(width) if tokens else f.views["pooled"].row_shape[0],
            tokens=tokens,
        )

    return {modality: tuple(describe(f, widths[modality]) for f in group) for modality, group in chosen.items()}


def width_of(group: Sequence[UsedFeatures]) -> int:
    """Return the width of features side by side. Raises RunError for tokens of several encoders, or not whole ones."""
    width, tokens = sum(used.width for used in group), group[0].tokens if group else 0
    if tokens and (len(group) > 1 or tokens < 0 or width % tokens):
        raise RunError(f"{width} numbers a sample are not {tokens} tokens of one encoder")
    return TokenWidth(width, tokens) if tokens else width


def match_features(run: "Run", used: UsedByModality, store: FeatureStore) -> dict[str, list[Features]]:
    """Return a store's features that a run's member reads. Raises RunError if the store has others or none."""
    if store.classes != run.classes:
        raise RunError(f"run {run.name} was trained on other classes than {store.path} has now; train again")
    matched: dict[str, list[Features]] = {}
    for modality, group in used.items():
        for one in group:
            features = store.open_features(one.encoder, modality)
            if features is None:
                raise RunError(f"run {run.name} was trained on {one.encoder} ({modality}), which {store.path} lacks")
            if features.key != one.key:
                raise RunError(
                    f"run {run.name} was trained on another store: its {one.encoder} ({modality}) features were made "
                    f"differently from those in {store.path}; train again, or take the store it was trained on"
                )
            matched.setdefault(modality, []).append(features)
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
                lookup(run.features, modality, "modality")
            for member in run.members:
                if self._key(member) not in self._tables:
                    table = open_table(run, member.features, store)
                    gone = [modality for modality in table.present if modality in without]
                    self._tables[self._key(member)] = table.without(gone).to(resolve_device(device))

    def __call__(self, member: "Member") -> FeatureTable:
        return self._tables[self._key(member)]

    def _key(self, member: "Member") -> tuple[Any, ...]:
        return tuple(member.features.items())


def open_table(run: "Run", used: UsedByModality, store: FeatureStore) -> FeatureTable:
    """Open a store's features as a run's member reads them. Raises RunError if the store has others or none."""
    chosen = match_features(run, used, store)
    n_tokens = {modality: group[0].tokens for modality, group in used.items()}
    return load_table(store, chosen, "tokens" if any(n_tokens.values()) else "pooled", n_tokens)
