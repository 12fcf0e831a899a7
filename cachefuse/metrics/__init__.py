"""Metrics: ``METRICS[name](targets, scores, predictions) -> float``, and which of them stand for a model.

Targets (N, C) are 0 or 1 (one-hot for multi-class), of answers to questions also between: how right each is. Scores
(N, C) are higher for likelier labels, predictions (N, C) are bool. All C classes count, whether or not they occur. What
is not defined for want of positives counts as 0, an average over nothing is NaN. Importing this package imports no
NumPy.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from cachefuse.errors import ConfigError
from cachefuse.registry import Registry

if TYPE_CHECKING:
    from cachefuse.metrics.base import Metric

# A metric is a ``cachefuse.metrics.base.Metric``, which knows its title, and whether it is lower for a better model.
METRICS: "Registry[Metric]" = Registry(
    "metric",
    "cachefuse.metrics",
    {
        "accuracy": "cachefuse.metrics.decisions:accuracy",
        "calibration_error": "cachefuse.metrics.calibration:calibration_error",
        "exact_match": "cachefuse.metrics.decisions:exact_match",
        "macro_ap": "cachefuse.metrics.ranking:macro_ap",
        "macro_f1": "cachefuse.metrics.decisions:macro_f1",
        "micro_ap": "cachefuse.metrics.ranking:micro_ap",
        "micro_f1": "cachefuse.metrics.decisions:micro_f1",
        "recall_at_p90": "cachefuse.metrics.ranking:recall_at_p90",
        "samples_f1": "cachefuse.metrics.decisions:samples_f1",
        "top5_accuracy": "cachefuse.metrics.decisions:top5_accuracy",
        "top_calibration_error": "cachefuse.metrics.calibration:top_calibration_error",
        "vqa_accuracy": "cachefuse.metrics.decisions:vqa_accuracy",
        "weighted_f1": "cachefuse.metrics.decisions:weighted_f1",
    },
)
MEAN = "mean"  # of several tasks' main metrics
TOP = 5  # scores that top5_accuracy looks at

EVALUATION_METRICS = {
    "multiclass": (
        "accuracy", "top5_accuracy", "macro_f1", "weighted_f1", "macro_ap", "micro_ap", "recall_at_p90",
        "top_calibration_error",
    ),
    "multilabel": (
        "micro_f1", "macro_f1", "samples_f1", "weighted_f1", "exact_match", "macro_ap", "micro_ap", "recall_at_p90",
        "calibration_error",
    ),
    "vqa": ("vqa_accuracy", "top5_accuracy", "macro_ap"),
}  # fmt: skip


def metric_title(name: str) -> str:
    """Return what tables call a metric; that of one of several tasks begins with its name."""
    task, _, metric = name.rpartition(".")
    title = METRICS[metric].title or metric if _is_metric(metric) else metric
    return f"{task} {title}".lstrip()


def lower_is_better(name: str) -> bool:
    """Whether a metric, of one of several tasks or not, is lower for a better model."""
    metric = name.rpartition(".")[2]
    return _is_metric(metric) and METRICS[metric].lower_is_better


def main_metric(names: Iterable[str]) -> str:
    """Return the metric to prefer a model by: the first that is higher for a better one."""
    return next((name for name in names if not lower_is_better(name)), "accuracy")


def headline(names: Iterable[str]) -> list[str]:
    """Return those of a list of metrics that stand for all of it: of several tasks the mean, and the first of each."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(name.rpartition(".")[0] or name, name)
    return list(first.values())


def evaluation_metrics(task: str, n_classes: int) -> Sequence[str]:
    """Return the names of the metrics that an evaluation shows, in order. Raises ConfigError for another task."""
    if task not in EVALUATION_METRICS:
        raise ConfigError(f"task must be one of {', '.join(EVALUATION_METRICS)} to evaluate. Got {task!r} instead.")
    idle = {"top5_accuracy"} if n_classes <= TOP else set()  # it is always 1
    return tuple(name for name in EVALUATION_METRICS[task] if name not in idle)


def _is_metric(name: str) -> bool:
    return name != MEAN and name in METRICS  # the mean first: to look for it among other packages' takes a while
