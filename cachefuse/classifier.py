"""A scikit-learn classifier, for cross-validation, searches and pipelines."""

import copy
import inspect
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_consistent_length, check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from cachefuse.data.folds import stratified_folds
from cachefuse.data.manifest import DEFAULT_METRICS
from cachefuse.device import resolve_device
from cachefuse.errors import DataError
from cachefuse.files import JsonObject
from cachefuse.metrics.decisions import decide
from cachefuse.printable import listed
from cachefuse.settings import settings_of
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TRAIN, VAL, TrainingData
from cachefuse.training.feature_set import FeatureView
from cachefuse.training.feature_table import multi_hot
from cachefuse.training.inference import predict_scores
from cachefuse.training.train import train_models

HELD_PARTS = 10  # one in so many rows is held out, if epochs or thresholds are chosen


ELSEWHERE = ("views", "seed", "duplicates")  # settings that X decides on, ``random_state``, and one that needs a store
DEFAULTS: JsonObject = {
    name: None if one.kind is Mapping else one.default
    for name, one in settings_of(TrainConfig).items()
    if name not in ELSEWHERE
}


class FusionClassifier(ClassifierMixin, BaseEstimator):
    """A classifier that fuses features of several modalities. Its parameters are the settings of ``TrainConfig`` too.

    X is a ``FeatureView`` or a dictionary of arrays {modality: (n, D_m)}; an array (n, D) is one modality.
    Cross-validation cannot select rows of a dictionary: use ``FeatureView.from_arrays`` there. A row of only NaN means
    that the sample lacks the modality. y is labels (n,) of any type, or 0 and 1 (n, C) for multi-label.

    A stratified tenth of the rows is held out to choose an epoch (with ``patience``), multi-label thresholds (unless
    "none") and a calibration (with ``calibrate``); with ``folds``, each fold is held out in turn. ``refit`` then trains
    on all rows. ``min_labels`` is the minimum number of labels per multi-label row.

    Attributes: ``classes_`` (C,), or (C, 2) for multi-label, with 0 and 1 for each label; ``thresholds_`` (C,);
    ``calibration_``, or None; ``models_`` and ``histories_``, one per fold and member; ``config_``, all settings;
    ``n_features_in_``.
    """

    def __init__(
        self,
        *,
        min_labels: int = 0,
        random_state: int | np.random.RandomState | None = TrainConfig.seed,
        device: str = "auto",
        **settings: Any,
    ) -> None:
        unknown = sorted(settings.keys() - DEFAULTS.keys())
        if unknown:
            renamed = {one.about.old: f" (now {name!r})" for name, one in settings_of(TrainConfig).items()}
            hint = renamed.get(unknown[0], "")
            raise TypeError(f"FusionClassifier has no parameter {unknown[0]!r}{hint}; choose from: {listed(DEFAULTS)}")
        for name, value in {**DEFAULTS, **settings}.items():
            setattr(self, name, value)
        self.min_labels = min_labels
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: Any) -> "FusionClassifier":
        """Train on X and y. Raises ConfigError for settings that do not fit, DataError for unusable data."""
        X = self._view(X, reset=True)
        targets, self.classes_, self._task = _encode(y)
        check_consistent_length(X, targets)
        config = self._config()
        chooses = config.patience or config.calibrate != "none"
        chooses = chooses or (self._task == "multilabel" and config.thresholds != "none")
        splits = _hold_out(targets, config.seed) if chooses else np.full(len(targets), TRAIN)
        data = TrainingData.of_one_task(
            name="X",
            table=X.to_table(torch.from_numpy(targets), splits).to(resolve_device(self.device)),
            classes=tuple(str(c) for c in range(targets.shape[1])),
            task=self._task,
            metrics=DEFAULT_METRICS[self._task],
            min_labels=self.min_labels,
        )
        trained = train_models(data, data.resolve(config), keep_interrupted=True)
        self.config_ = trained.members[0].config
        self.models_ = [member.model.cpu() for member in trained.members]
        self.histories_ = trained.histories
        self.thresholds_, self.calibration_ = trained.thresholds, trained.calibration
        self._tasks = data.tasks
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return probabilities (n, C) float32 of the classes, or of each label for multi-label."""
        check_is_fitted(self, "models_")
        X = self._view(X, reset=False)
        device, loss = resolve_device(self.device), self.config_.loss
        table = X.to_table(torch.zeros(len(X), len(self.thresholds_)), np.array([""] * len(X)))
        table = table.only(self.models_[0].specs).to(device)
        scores = [
            predict_scores(copy.deepcopy(model).to(device), table, torch.arange(len(X)), loss) for model in self.models_
        ]
        mean: np.ndarray = np.stack(scores).mean(axis=0, dtype=np.float64)
        mean = mean.astype(np.float32)
        return mean if self.calibration_ is None else self.calibration_(mean, self._tasks)

    def predict(self, X: Any) -> np.ndarray:
        """Return labels (n,); for multi-label 0 and 1 (n, C), with 1 if the probability reaches the threshold."""
        scores = self.predict_proba(X)
        chosen = decide(scores, self._task, self.thresholds_, self.min_labels)
        return chosen.astype(np.int64) if self._task == "multilabel" else self.classes_[chosen.argmax(axis=1)]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        tags.input_tags.dict = True
        return tags

    def _config(self) -> TrainConfig:
        given, seed = self.get_params(deep=False), self.random_state
        if not isinstance(seed, numbers.Integral):
            seed = check_random_state(seed).randint(2**31 - 1)
        known = settings_of(TrainConfig)
        values = {name: known[name].parse(given[name]) for name in DEFAULTS}
        return TrainConfig(**values, seed=int(seed))

    def _view(self, X: Any, reset: bool) -> FeatureView:
        """Return X as a view. With ``reset`` it sets the number of features, else it must fit the trained model."""
        if isinstance(X, FeatureView):
            view = X
        else:
            several = isinstance(X, Mapping) and not hasattr(X, "shape")  # some sparse arrays of SciPy are mappings
            X = X if several else {"x": validate_data(self, X, reset=reset, ensure_all_finite=False)}
            view = FeatureView.from_arrays(X)
        if reset:
            self.n_features_in_ = view.shape[1]
            return view
        expected = {name: spec.width for name, spec in self.models_[0].specs.items()}
        widths = {modality: x.shape[1] for modality, x in view.table.features.items()}
        if any(widths.get(modality) != width for modality, width in expected.items()):
            raise DataError(
                f"X must have the features of the training, {_listed(expected)}. Got {_listed(widths)} instead; "
                f"use rows of NaN for a modality that is absent"
            )
        return view


def _signature() -> inspect.Signature:
    """Return the constructor's signature with all settings, because scikit-learn reads parameters there."""
    first, *others = inspect.signature(FusionClassifier.__init__).parameters.values()
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=x) for name, x in DEFAULTS.items()]
    return inspect.Signature([first, *named, *(other for other in others if other.kind is other.KEYWORD_ONLY)])


vars(FusionClassifier.__init__)["__signature__"] = _signature()


def _listed(widths: Mapping[str, int]) -> str:
    return listed(f"{modality} ({width})" for modality, width in widths.items())


def _encode(y: Any) -> tuple[np.ndarray, np.ndarray, str]:
    """Return targets (n, C) of 0 and 1, the classes, and the task. Raises DataError for unusable labels."""
    check_classification_targets(y)
    kind, y = type_of_target(y), y.toarray() if issparse(y) else np.asarray(y)
    if kind == "multilabel-indicator" and np.isin(y, (0, 1)).all():
        return multi_hot(y, y.shape[1]), np.tile([0, 1], (y.shape[1], 1)), "multilabel"
    if kind not in ("binary", "multiclass"):
        raise DataError(
            f"y must be labels (n,), or 0 and 1 (n, C) for multi-label, as from MultiLabelBinarizer. "
            f"Got {y.dtype} {y.shape} with {np.unique(y)[:3].tolist()} instead"
        )
    classes, numbered = np.unique(column_or_1d(y, warn=True), return_inverse=True)
    if len(classes) < 2:
        given = f"{len(classes)} class ({listed(map(str, classes))})"
        raise DataError(f"y must have at least two classes. Got {given} instead")
    return multi_hot(numbered, len(classes)), classes, "multiclass"


def _hold_out(targets: np.ndarray, seed: int) -> np.ndarray:
    """Return each row's split (n,), train or val, for targets (n, C); a single row is for training."""
    parts = stratified_folds(targets, min(HELD_PARTS, len(targets)), seed) if len(targets) > 1 else np.ones(1)
    return np.where(parts == 0, VAL, TRAIN)
