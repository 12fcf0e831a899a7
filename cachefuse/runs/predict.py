"""Predictions of a run: for rows of a store, or for raw samples through the run's encoders."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cachefuse.data.column import Column, TextOrSource
from cachefuse.data.dataset import check_ids
from cachefuse.data.readers.base import Samples
from cachefuse.data.readers.table import TableReader, read_columns
from cachefuse.data.targets import is_labelled
from cachefuse.device import resolve_device
from cachefuse.encoders import open_encoder
from cachefuse.encoders.base import EncoderSpec, Tower, is_derived
from cachefuse.errors import BadSampleError, DataError, RunError
from cachefuse.extraction.pipeline import count_long_texts, encode_prepared, is_bad, prepare_in_order
from cachefuse.extraction.request import BATCH_SIZE
from cachefuse.feature_spec import FLAT, IDS, NGRAMS, NUMBERED, TOKENS
from cachefuse.metrics.tasks import TaskSlice
from cachefuse.printable import listed
from cachefuse.runs.features import RunFeatures, specs_of
from cachefuse.runs.run import Member, Run, begins_as
from cachefuse.runs.tables import StoreTables
from cachefuse.store.format import DTYPES, provenance_key
from cachefuse.store.long_texts import LongTexts
from cachefuse.store.store import FeatureStore
from cachefuse.store.tokens import Tokens
from cachefuse.threads import adapt_threads, idle_threads
from cachefuse.training.feature_table import FeatureTable
from cachefuse.training.selection import stored_views

logger = logging.getLogger(__name__)


Wanted = tuple[str, RunFeatures]  # a feature's name, and its features by one encoder


@dataclass(frozen=True)
class Predictions:
    """The predictions for n rows: ids, scores (n, C) from 0 to 1, and predicted labels (n, C) bool.

    ``tasks`` are set only for a dataset with several tasks; a class is then called "color=red".
    """

    ids: list[str]
    classes: tuple[str, ...]
    scores: np.ndarray
    labels: np.ndarray
    tasks: tuple[TaskSlice, ...] = ()

    def names(self, row: int) -> list[str]:
        """Return the labels of a row, in class order."""
        return [self.classes[c] for c in np.flatnonzero(self.labels[row])]

    def by_task(self, row: int) -> dict[str, list[str]]:
        """Return the labels of a row for each of several tasks, {"color": ["red"]}."""
        return {
            task.name: [task.own_class(self.classes[c]) for c in task.numbers[self.labels[row, task.columns]]]
            for task in self.tasks
        }


def predict_split(run: Run, store: FeatureStore, split: str | None = None, *, device: str = "auto") -> Predictions:
    """Predict the rows of a split, in the store's order.

    The default is the rows of all splits without labels; if there are none, the rows without labels; else the test
    split. Warns if rows have changed since the training, other than by new ones after them. Raises RunError if the run
    was trained on another store, DataError if there are no such rows.
    """
    tables = StoreTables([run], store, device)
    if not begins_as(store, run.split_digest):
        logger.warning(
            "samples or splits of %s changed since run %s was trained; train again if training samples did",
            store.dataset, run.name,
        )  # fmt: skip
    rows = _rows_to_predict(store, split)
    return _predict(run, tables, rows, [store.ids[row] for row in rows])


def predict_samples(
    run: Run,
    samples: Samples,
    *,
    device: str = "auto",
    max_bad: float = 1.0,
    on_progress: Callable[[str, int, int], None] = lambda modality, done, total: None,
) -> Predictions:
    """Encode raw samples with the run's encoders, and predict them. A sample may lack modalities.

    Raises RunError if an encoder has changed since the training, BadSampleError if the share of unusable samples is
    above ``max_bad``, DataError if the samples have no modality that the run reads.
    """
    sources = {
        modality: _one_each(modality, column, samples.ids)
        for modality, column in samples.modalities.items()
        if modality in run.modalities and len(column)
    }
    n = len(samples.ids)
    if not sources:
        raise DataError(f"run {run.name} reads {' and '.join(run.modalities)}; give at least one of them")
    device = resolve_device(device)
    encoded: dict[Wanted, Encoded] = {}
    present: dict[str, torch.Tensor] = {}
    by_modality: dict[str, dict[str, list[Wanted]]] = {modality: {} for modality in run.modalities}  # by encoder
    for name, group in run.features.items():
        for features in group:
            by_modality[features.modality].setdefault(features.source, []).append((name, features))
    needed = [source for modality, wanted in by_modality.items() if modality in sources for source in wanted]
    # Their keys are compared with those of the features that the run was trained on.
    opened = {source: open_encoder(_beside(run, source), device, whole=True) for source in dict.fromkeys(needed)}
    for modality, by_encoder in by_modality.items():
        bad: dict[int, BadSampleError] = {}
        for source, wanted in by_encoder.items():
            encoded |= {key: Encoded.empty(key[1], n) for key in wanted}
            if modality in sources:
                for _, features in wanted:
                    tower = _checked_tower(run, opened[source], modality, features)
                outs = [encoded[key] for key in wanted]
                bad.update(_encode(tower, sources[modality], outs, device, on_progress))
        if bad:
            row, error = next(iter(bad.items()))
            first = f"{getattr(sources[modality][row], 'name', samples.ids[row])}: {error}"
            if len(bad) > max_bad * n:
                raise BadSampleError(first)
            logger.warning("%s of %s samples are predicted without %s; the first: %s", len(bad), n, modality, first)
        present[modality] = torch.tensor([modality in sources and row not in bad for row in range(n)])
    if not any(mask.any() for mask in present.values()):
        raise DataError(f"run {run.name} reads {' and '.join(run.modalities)}, but no sample has a usable one")

    def table_of(member: Member) -> FeatureTable:
        inputs = {
            name: Encoded.columns([encoded[(name, features)] for features in group])
            for name, group in member.features.items()
        }
        specs = specs_of(member.features)
        return FeatureTable(
            features=inputs,
            specs=specs,
            present={name: present[spec.modality] for name, spec in specs.items()},
            targets=torch.zeros(n, len(run.classes), dtype=torch.uint8),
            labelled=np.zeros(n, bool),
            splits=np.array([""] * n),
        ).to(device)

    return _predict(run, table_of, np.arange(n), samples.ids)


def read_input(path: Path, run: Run) -> Samples:
    """Read new samples from a table, with the dataset's columns or with columns "id", "image", "text" and so on.

    Image paths are relative to the table's folder. Raises DataError if the file is missing, has no column of a modality
    that the run reads, has no rows, or has a row with an empty id.
    """
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    reader = run.manifest.open_reader()
    declared = {"id": reader.id, **reader.columns} if isinstance(reader, TableReader) else {}
    names = read_columns(path, wanted=()).names
    known = set(names)
    chosen: dict[str, str] = {}
    for key in ("id", *run.modalities):
        for template in (declared.get(key), key):
            if template and TableReader.places(template) <= known:
                chosen[key] = template
                break
    template_of_id = chosen.pop("id", None)
    if not chosen:
        needed = " or ".join(run.modalities)
        raise DataError(f"{path}: needs a column {needed}; its columns are: {listed(names)}")
    samples = TableReader(files={"input": path.name}, id=template_of_id, modalities=chosen).read(path.parent)
    check_ids(samples.ids, path.name)
    for note in samples.notes:
        logger.warning("%s", note)
    return samples


def _one_each(modality: str, column: Column, ids: Sequence[str]) -> list[TextOrSource | None]:
    """Return the source of each sample; several texts are joined. Raises DataError for several other sources."""
    if column.is_text:
        return [_one_text(column[row]) for row in range(len(column))]
    if column.offsets is not None:
        row = int(np.diff(column.offsets).argmax())
        raise DataError(f"sample {ids[row]} has {len(column[row])} sources of {modality}; a prediction reads only one")
    return column.feature_sources()


def _one_text(texts: tuple[TextOrSource, ...]) -> TextOrSource:
    """Return several texts joined, or the first one that is unusable."""
    unusable = next((text for text in texts if not isinstance(text, str)), None)
    return " ".join(map(str, texts)) if unusable is None else unusable


def _beside(run: Run, source: str) -> EncoderSpec:
    """Return the spec that opens an encoder. A moved alignment is looked up in the folder of the run."""
    spec = EncoderSpec.parse(source)
    beside = run.path.resolve().parent / Path(spec.model).name if run.path is not None else Path(spec.model)
    moved = is_derived(source) and not Path(spec.model).is_dir() and beside.is_dir()
    return replace(spec, model=str(beside)) if moved else spec


def _rows_to_predict(store: FeatureStore, split: str | None) -> np.ndarray:
    known = listed(np.unique(store.splits).tolist())
    if split is not None:
        rows = np.flatnonzero(store.splits == split)
        if not len(rows):
            raise DataError(f"{store.dataset} has no rows in split {split!r}; its splits are: {known}")
        return rows
    labelled = is_labelled(store.targets)
    # A training row without a label does not belong in a submission.
    trained = np.unique(store.splits[labelled])  # unique first: isin is slow for strings
    for mask in (~np.isin(store.splits, trained), ~labelled, store.splits == "test"):
        if mask.any():
            return np.flatnonzero(mask)
    raise DataError(f"every row of {store.dataset} has labels, and no split is called test; name a split: {known}")


def _predict(run: Run, table_of: Callable[[Member], FeatureTable], rows: np.ndarray, ids: list[str]) -> Predictions:
    scores = run.scores(table_of, torch.from_numpy(rows))
    return Predictions(ids, run.classes, scores, run.decide(scores), tuple(task for task in run.tasks if task.name))


def _checked_tower(run: Run, towers: dict[str, Tower], modality: str, features: RunFeatures) -> Tower:
    tower = towers.get(modality)
    if tower is None or provenance_key({**tower.provenance, "dtype": features.dtype}) != features.key:
        raise RunError(
            f"run {run.name} was trained with other weights or preprocessing than {features.source} has now; "
            f"restore them, or extract and train again"
        )
    return tower


@dataclass(frozen=True)
class Encoded:
    """The encoded features of n raw samples, in the store's dtype: pooled (n, D), or each sample's tokens."""

    features: RunFeatures
    rows: list[np.ndarray]

    @classmethod
    def empty(cls, features: RunFeatures, n: int) -> "Encoded":
        """Return the features of samples without the modality: zeros, or no tokens."""
        dtype = np.dtype("<i8") if features.view in NUMBERED else DTYPES[features.dtype]
        shape = {TOKENS: (0, features.width), IDS: (0,), NGRAMS: (0, 2)}.get(features.view, (features.width,))
        return cls(features, [np.zeros(shape, dtype)] * n)

    def put(self, row: int, value: np.ndarray) -> bool:
        """Set a sample's features; return whether they are finite in the store's dtype."""
        empty = self.rows[row]
        if self.features.view == FLAT:
            flat = np.zeros_like(empty, value.dtype)
            kept = value.reshape(-1)[: self.features.width]  # fewer tokens leave zeros at the end
            flat[: len(kept)] = kept
            value = flat
        with np.errstate(over="ignore"):
            value = value.astype(empty.dtype)
        finite = bool(np.isfinite(value).all())
        if finite:
            self.rows[row] = value
        return finite

    @staticmethod
    def columns(group: "Sequence[Encoded]") -> Tensor | Tokens:
        """Return a model's input: concatenated pooled features of one or more encoders, or tokens of one encoder."""
        first = group[0].features
        if first.view in (TOKENS, *NUMBERED):
            rows = [torch.from_numpy(row) for row in group[0].rows]
            return Tokens(rows, first.width if first.view in NUMBERED else 0)
        return torch.from_numpy(np.concatenate([np.stack(encoded.rows) for encoded in group], axis=1))


@idle_threads()
def _encode(
    tower: Tower,
    sources: Sequence[TextOrSource | None],
    outs: Sequence[Encoded],
    device: str,
    on_progress: Callable[[str, int, int], None],
) -> dict[int, BadSampleError]:
    """Encode samples into each of ``outs``, and return the unusable rows with their errors."""
    bad: dict[int, BadSampleError] = {}
    counts: list[LongTexts] = []
    views = [*stored_views([out.features.view for out in outs])]
    size = BATCH_SIZE[device.partition(":")[0]]
    with prepare_in_order(tower, sources, range(len(sources)), 4 * size) as prepared:
        window = []
        for row, item in enumerate(prepared):
            window.append(item)
            if is_bad(item):
                bad[row] = item
            if len(window) == size or row == len(sources) - 1:
                adapt_threads()
                first = row + 1 - len(window)
                encoded = encode_prepared(tower, window, tuple(dict.fromkeys(views)), size)
                for out, view in zip(outs, views, strict=True):
                    for i, value in enumerate(encoded[view]):
                        if value is not None and not out.put(first + i, value):
                            bad[first + i] = BadSampleError(f"features are not finite in {out.features.dtype}")
                counts += [long] if (long := count_long_texts(tower, window)) is not None else []
                window = []
                on_progress(tower.modality, row + 1, len(sources))
    if counts and (long := LongTexts.total(counts)).is_cut:
        logger.warning("%s", long.message)
    return bad
