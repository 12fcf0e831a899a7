"""Tables of a store's features for the models of runs."""

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

    Raises RunError if the store lacks them or has other ones.
    """
    if store.classes != run.classes:
        raise RunError(f"run {run.name} was trained on other classes than {store.path} has now; train again")
    matched: dict[str, list[Features]] = {}
    for group in features.values():
        for wanted in group:
            stored = store.open_features(wanted.encoder, wanted.modality)
            named = f"{wanted.encoder} ({wanted.modality})"
            if stored is None:
                raise RunError(f"run {run.name} reads {named}, which {store.path} lacks; extract it first")
            if stored.key != wanted.key:
                raise RunError(
                    f"run {run.name} was trained on another store: {store.path} has {named} features with other "
                    f"weights or preprocessing; train again, or use the store of the training"
                )
            of_modality = matched.setdefault(wanted.modality, [])
            if wanted.encoder not in [other.encoder for other in of_modality]:  # a run may read several of its views
                of_modality.append(stored)
    return matched


class StoreTables:
    """A store's features as tables for the members of runs; raises RunError if a run was trained on another store.

    Members that read the same features share one table.
    """

    def __init__(
        self, runs: "Sequence[Run]", store: FeatureStore, device: str = "auto", without: Collection[str] = ()
    ) -> None:
        """``without`` names modalities to treat as absent. Raises UnknownNameError if a run does not read one."""
        self._tables: dict[tuple[object, ...], FeatureTable] = {}
        for run in runs:
            for modality in without:
                lookup(dict.fromkeys(run.modalities), modality, "modality")
            for member in run.members:
                if self._key(member) not in self._tables:
                    table = open_table(run, member.features, store)
                    absent = [modality for modality in modalities_of(table.specs.values()) if modality in without]
                    self._tables[self._key(member)] = table.without(absent).to(resolve_device(device))

    def __call__(self, member: "Member") -> FeatureTable:
        return self._tables[self._key(member)]

    def _key(self, member: "Member") -> tuple[object, ...]:
        return tuple(member.features.items())


def open_table(run: "Run", features: RunFeaturesByName, store: FeatureStore) -> FeatureTable:
    """Open the features that a run's member reads. Raises RunError if the store lacks them or has other ones."""
    chosen = match_features(run, features, store)
    views: dict[str, list[str]] = {}
    n_tokens: dict[str, int] = {}
    for group in features.values():
        views.setdefault(group[0].modality, []).append(group[0].view)
        if group[0].view == FLAT:
            n_tokens[group[0].modality] = group[0].tokens
    return load_table(store, chosen, views.__getitem__, n_tokens)
