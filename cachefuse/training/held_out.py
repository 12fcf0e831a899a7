"""Scores, thresholds and figures of rows held out."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cachefuse.errors import ConfigError
from cachefuse.metrics.calibrators import Calibration, fit_calibration
from cachefuse.metrics.per_class import per_task_class
from cachefuse.metrics.tasks import TaskSlice, decide_tasks
from cachefuse.metrics.thresholds import HALF, THRESHOLD_METRICS, choose_thresholds, crossfit_decisions
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TrainingData
from cachefuse.training.feature_table import LOAD_ROWS
from cachefuse.training.inference import to_scores

CROSSFIT_PARTS = 5  # of a validation split; each uses thresholds chosen on the others
FEWEST_ROWS = 4  # to calibrate: half of them choose for the others


@dataclass(frozen=True)
class HeldOut:
    """Scores (n, C) float32 of rows (n,), by models that have not seen them.

    ``split`` is "val", or "oof" for train and val out of fold. ``parts`` (n,) int64 is the part of each row. Each part
    uses thresholds chosen on the other parts: no row helps to choose its own thresholds. The scores are as the models
    give them, before calibration.
    """

    split: str
    rows: np.ndarray
    parts: np.ndarray
    scores: np.ndarray

    @classmethod
    def join(cls, split: str, data: TrainingData, rows: list[Tensor], scores: list[np.ndarray]) -> "HeldOut | None":
        """Join the folds' rows and scores, in the table's order; None without rows."""
        numbers = [piece.numpy() for piece in rows]
        all_rows = np.concatenate(numbers)
        if not len(all_rows):
            return None
        if len(rows) > 1:
            parts = np.repeat(np.arange(len(rows)), [len(piece) for piece in numbers])
        elif len(all_rows) < 2 or all(task.one_label for task in data.tasks):
            parts = np.zeros(len(all_rows), np.int64)  # there are no thresholds to choose
        else:
            parts = data.folds(rows[0], min(CROSSFIT_PARTS, data.n_groups(rows[0])), 0).numpy()
        order = np.argsort(all_rows, kind="stable")
        places = np.split(order.argsort(), np.cumsum([len(piece) for piece in numbers])[:-1])
        all_scores = np.empty((len(all_rows), len(data.classes)), np.float32)
        for place, values in zip(places, scores, strict=True):
            all_scores[place] = values
        return cls(split, all_rows[order], parts[order], all_scores)

    def decided(
        self, data: TrainingData, config: TrainConfig, scores: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return calibrated scores and predictions (n, C) of ``scores`` (n, C), by default of ``self.scores``.

        Each part is calibrated and decided as new rows would be if the other parts were all that is held out. If there
        is only one part, its scores stay as they are.
        """
        scores = self.scores if scores is None else scores
        if config.calibrate == "none":
            return scores, self.predictions(data, config, scores)
        calibrated, predictions = scores.copy(), decide_tasks(scores, data.tasks)
        parts = self.parts_to_calibrate(data)
        for part in np.unique(parts):
            own, rest = parts == part, parts != part
            if rest.sum() >= 2:
                others = replace(self, rows=self.rows[rest], parts=parts[rest], scores=self.scores[rest])
                calibration, thresholds = final_decision(data, config, others)
                calibrated[own] = calibration(scores[own], data.tasks) if calibration else scores[own]
                predictions[own] = decide_tasks(calibrated[own], data.tasks, thresholds)
        return calibrated, predictions

    def parts_to_calibrate(self, data: TrainingData) -> np.ndarray:
        """Return the parts (n,) to fit calibrations apart; rows without thresholds to choose have no parts yet."""
        rows = torch.from_numpy(self.rows)
        n_parts = min(CROSSFIT_PARTS, data.n_groups(rows))
        if n_parts < 2 or len(np.unique(self.parts)) > 1:
            return self.parts
        return data.folds(rows, n_parts, 0).numpy()

    def predictions(self, data: TrainingData, config: TrainConfig, scores: np.ndarray | None = None) -> np.ndarray:
        """Return the predicted labels (n, C) bool; each part uses thresholds chosen on the other parts.

        The thresholds are always chosen on ``self.scores``, without calibration; they may be applied to other
        ``scores`` (n, C).
        """
        scores = self.scores if scores is None else scores
        predictions = decide_tasks(scores, data.tasks)
        if not chooses_thresholds(data, config, len(self.rows)):
            return predictions
        targets, per_class = data.targets(torch.from_numpy(self.rows)), config.thresholds == "class"
        for task in data.tasks:
            rows = np.flatnonzero(task.labelled(targets))  # figures use only labelled rows
            if task.kind == "multilabel" and len(np.unique(self.parts[rows])) > 1:
                metric, of_task = _threshold_metric(data, config, task), np.ix_(rows, task.numbers)
                predictions[of_task] = crossfit_decisions(
                    targets[of_task],
                    self.scores[of_task],
                    self.parts[rows],
                    metric,
                    per_class,
                    task.min_labels,
                    scores[of_task],
                )
        return predictions


@dataclass(frozen=True)
class Result:
    """Figures on ``n_rows`` of one split: metrics by name, and figures per class, (C,) by name."""

    n_rows: int
    metrics: dict[str, float]
    per_class: dict[str, list[float]]


def chooses_thresholds(data: TrainingData, config: TrainConfig, n_held_out: int) -> bool:
    """Whether thresholds are chosen on ``n_held_out`` rows. Raises ConfigError if they must be, but cannot."""
    if not any(task.kind == "multilabel" for task in data.tasks):
        if config.thresholds in ("global", "class"):
            raise ConfigError(
                "thresholds are only for multi-label tasks; leave them out: a row gets the class with the highest score"
            )
        return False
    if n_held_out >= 2 or config.thresholds in ("none", "auto"):
        return n_held_out >= 2 and config.thresholds != "none"
    raise ConfigError(
        f"{data.name} has {n_held_out} labelled validation rows, too few to choose thresholds; use --folds 5 or "
        f"--thresholds none"
    )


def check_calibrates(data: TrainingData, config: TrainConfig, n_held_out: int) -> None:
    """Raise ConfigError if scores must be calibrated on ``n_held_out`` rows, but cannot be."""
    if config.calibrate == "none":
        return
    if any(task.kind == "vqa" for task in data.tasks):
        raise ConfigError(
            "calibrate is not for answers to questions, of which several may be right in part; leave it out"
        )
    if n_held_out < FEWEST_ROWS:
        raise ConfigError(
            f"{data.name} has {n_held_out} labelled validation rows, too few to calibrate scores; use --folds 5"
        )


def final_decision(
    data: TrainingData, config: TrainConfig, held_out: HeldOut | None
) -> tuple[Calibration | None, np.ndarray]:
    """Return what turns scores into predictions, from all rows held out: a calibration, and thresholds (C,) after it.

    The calibration is None if the settings have none, or no rows are held out.
    """
    if held_out is None or config.calibrate == "none":
        return None, final_thresholds(data, config, held_out)
    targets = data.targets(torch.from_numpy(held_out.rows))
    calibration = fit_calibration(config.calibrate, targets, held_out.scores, data.tasks)
    calibrated = replace(held_out, scores=calibration(held_out.scores, data.tasks))
    return calibration, final_thresholds(data, config, calibrated)


def final_thresholds(data: TrainingData, config: TrainConfig, held_out: HeldOut | None) -> np.ndarray:
    """Return the thresholds (C,) for predictions: chosen on all rows held out that have the task's label, or 0.5."""
    thresholds = np.full(len(data.classes), HALF)
    if held_out is None or not chooses_thresholds(data, config, len(held_out.rows)):
        return thresholds
    targets, per_class = data.targets(torch.from_numpy(held_out.rows)), config.thresholds == "class"
    for task in data.tasks:
        task_targets, scores = task.own(targets, held_out.scores)
        if task.kind == "multilabel" and len(task_targets) >= 2:
            metric = _threshold_metric(data, config, task)
            thresholds[task.columns] = choose_thresholds(task_targets, scores, metric, per_class, task.min_labels)
    return thresholds


def figures(data: TrainingData, rows: Tensor, scores: np.ndarray, predictions: np.ndarray) -> Result:
    """Return the dataset's metrics and the figures per class, for rows (n,) with scores and predictions (n, C)."""
    arrays = data.targets(rows), scores, predictions  # (n, C) each
    by_class = per_task_class(*arrays, data.tasks)
    return Result(
        n_rows=len(rows),
        metrics={name: metric(*arrays) for name, metric in data.bind(data.metrics).items()},
        per_class={name: values.tolist() for name, values in by_class.items()},
    )


def _threshold_metric(data: TrainingData, config: TrainConfig, task: TaskSlice) -> str:
    """Return the metric to choose thresholds for: the settings' metric, or the task's first F1 metric."""
    names = {task.named(name): name for name in THRESHOLD_METRICS}
    listed = [names[name] for name in data.metrics if name in names]
    return config.threshold_metric or next(iter(listed), next(iter(THRESHOLD_METRICS)))


@torch.inference_mode()
def validation_score(data: TrainingData, rows: Tensor, metric: str, loss: str, logits: Tensor) -> float:
    """Return a metric of rows (n,) with thresholds of 0.5. The logits (n, C) are overwritten."""
    for piece in logits.split(LOAD_ROWS):
        piece.copy_(to_scores(piece, loss, data.tasks))
    scores = logits.numpy()
    return data.bind([metric])[metric](data.targets(rows), scores, decide_tasks(scores, data.tasks))
