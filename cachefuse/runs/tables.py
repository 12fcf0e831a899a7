"""A store's features, as the models of runs read them."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from cachefuse.device import resolve_device
from cachefuse.errors import RunError
from cachefuse.feature_spec import FLAT, modalities_of
from cachefuse.registry import lookup
from cachefuse.store.features import Features
from cachefuse.store.store import FeatureStore
from cachefuse.training.feature_table import FeatureTable
from cachefuse.training.selection import load_table

if TYPE_CHECKING:
    from cachefuse.runs.run import Member, Run
from cachefuse.runs.features import RunFeaturesByName


def match_features(run: "Run", features: RunFeaturesByName, store: FeatureStore) -> dict[str, list[Features]]:
    """Return the stored features that a run's member reads, by modality.

    Raises RunError if the store has others or none.
    """
    if store.classes != run.classes:
        raise RunError(f"run {run.name} was trained on other classes than {store.path} has now; train again")
    matched: dict[str, list[Features]] = {}
    for group in features.values():
        for one in group:
            stored = store.open_features(one.encoder, one.modality)
            named = f"{one.encoder} ({one.modality})"
            if stored is None:
                raise RunError(f"run {run.name} was trained on {named}, which {store.path} lacks")
            if stored.key != one.key:
                raise RunError(
                    f"run {run.name} was trained on another store: its {named} features were made "
                    f"differently from those in {store.path}; train again, or take the store it was trained on"
                )
            group_so_far = matched.setdefault(one.modality, [])
            if one.encoder not in [other.encoder for other in group_so_far]:  # of which several views are read
                group_so_far.append(stored)
    return matched


class StoreTables:
    """A store's features as runs' members read them; raises RunError if a run was trained on another store.

    Members that read the same share one table.
    """

    def __init__(
        self, runs: "Sequence[Run]", store: FeatureStore, device: str = "auto", without: Collection[str] = ()
    ) -> None:
        """``without`` names modalities to take as absent; UnknownNameError for one that a run does not read."""
        self._tables: dict[tuple[object, ...], FeatureTable] = {}
        for run in runs:
            for modality in without:
                lookup(dict.fromkeys(run.modalities), modality, "modality")
            for member in run.members:
                if self._key(member) not in self._tables:
                    table = open_table(run, member.features, store)
                    gone = [modality for modality in modalities_of(table.specs.values()) if modality in without]
                    self._tables[self._key(member)] = table.without(gone).to(resolve_device(device))

    def __call__(self, member: "Member") -> FeatureTable:
        return self._tables[self._key(member)]

    def _key(self, member: "Member") -> tuple[object, ...]:
        return tuple(member.features.items())


def open_table(run: "Run", features: RunFeaturesByName, store: FeatureStore) -> FeatureTable:
    """Open a store's features as a run's member reads them. Raises RunError if the store has others or none."""
    chosen = match_features(run, features, store)
    read: dict[str, list[str]] = {}
    n_tokens: dict[str, int] = {}
    for group in features.values():
        read.setdefault(group[0].modality, []).append(group[0].view)
        if group[0].view == FLAT:
            n_tokens[group[0].modality] = group[0].tokens
    return load_table(store, chosen, read.__getitem__, n_tokens)
