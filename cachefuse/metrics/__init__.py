"""Metrics: ``METRICS[name](targets, scores, predictions) -> float``, and the main ones of a list.

Targets (N, C) are 0 or 1 (one-hot for multi-class); for answers to questions they are in [0, 1]: how right each answer
is. Scores (N, C) are higher for likelier labels, predictions (N, C) are bool. All C classes count, even those that do
not occur. A value that is undefined without positives counts as 0; an average over nothing is NaN. Importing this
package does not import NumPy.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from cachefuse.errors import ConfigError
from cachefuse.registry import Registry

if TYPE_CHECKING:
    from cachefuse.metrics.base import Metric

# Each entry is a ``cachefuse.metrics.base.Metric``, which has a title and says whether lower is better.
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
    has=("weighted", "title", "lower_is_better"),
    probe="cachefuse.metrics.base:probe_metric",
)
CALIBRATION_ERROR = {"multiclass": "top_calibration_error", "multilabel": "calibration_error"}  # by kind of task
MEAN = "mean"  # of the main metrics of several tasks
TOP = 5  # scores per sample that top5_accuracy counts

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
    """Return a metric's title for tables. If there are several tasks, it begins with the task's name."""
    task, _, metric = name.rpartition(".")
    title = METRICS[metric].title or metric if _is_metric(metric) else metric
    return f"{task} {title}".lstrip()


def lower_is_better(name: str) -> bool:
    """Whether a lower value of a metric is better. The name may begin with a task's."""
    metric = name.rpartition(".")[2]
    return _is_metric(metric) and METRICS[metric].lower_is_better


def main_metric(names: Iterable[str]) -> str:
    """Return the metric by which models are compared: the first for which higher is better."""
    return next((name for name in names if not lower_is_better(name)), "accuracy")


def headline(names: Iterable[str]) -> list[str]:
    """Return the main metrics of a list: of several tasks the mean, and the first metric of each."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(name.rpartition(".")[0] or name, name)
    return list(first.values())


def evaluation_metrics(task: str, n_classes: int) -> Sequence[str]:
    """Return the names of the metrics that an evaluation shows, in order. Raises ConfigError for other tasks."""
    if task not in EVALUATION_METRICS:
        raise ConfigError(f"task must be one of {', '.join(EVALUATION_METRICS)} to evaluate. Got {task!r} instead.")
    trivial = {"top5_accuracy"} if n_classes <= TOP else set()  # it is always 1
    return tuple(name for name in EVALUATION_METRICS[task] if name not in trivial)


def _is_metric(name: str) -> bool:
    return name != MEAN and name in METRICS  # the mean first: a search in other packages is slow
