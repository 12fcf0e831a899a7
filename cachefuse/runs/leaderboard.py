"""The leaderboard of a search for the best model: what was tried, what each costs, and which models the run holds."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cachefuse.csv_writer import csv_for_people
from cachefuse.metrics import metric_title
from cachefuse.metrics.paired import ALPHA, Difference
from cachefuse.runs.files import Figure


@dataclass(frozen=True)
class Entry:
    """A candidate: its settings in words, its figures on the rows held out of ``n_folds`` folds, and what it costs.

    Figures and their ``interval`` (of the main metric) are NaN unless it was trained on all folds. ``log_loss``, of its
    calibrated scores, is of the folds at hand. ``seconds`` are of these trainings; ``size_mb`` and ``ms_per_item`` of
    one model. ``weight`` is its share in the mix. ``behind`` is the figure of the mix minus its own; its p is corrected
    for the number of candidates. ``problem`` says why it has no figures.
    """

    name: str
    n_folds: int
    log_loss: Figure
    metrics: dict[str, Figure]
    interval: tuple[Figure, Figure]
    seconds: float
    size_mb: Figure
    ms_per_item: Figure
    weight: float = 0.0
    behind: Difference | None = None
    problem: str = ""


@dataclass(frozen=True)
class Leaderboard:
    """What a search has tried, the best first: ``entries`` in order, of ``n_candidates`` on ``folds`` folds.

    ``metrics`` and ``interval`` are of the ``mix``: the mean of the models with a weight, each scoring rows that it has
    not seen, with weights chosen on other rows. ``minutes`` is the budget; None if it was a number of ``trials``.
    ``seconds`` are those of all trainings. ``bounds`` of size and time, in words, were kept.
    """

    entries: tuple[Entry, ...]
    n_candidates: int
    folds: int
    n_rows: int
    main: str
    metrics: dict[str, Figure]
    interval: tuple[Figure, Figure]
    log_loss: Figure
    minutes: float | None
    trials: int | None
    seconds: float
    bounds: str = ""

    @property
    def chosen(self) -> list[Entry]:
        """The candidates in the mix, by weight."""
        return sorted((entry for entry in self.entries if entry.weight > 0), key=lambda entry: -entry.weight)

    @property
    def finished(self) -> list[Entry]:
        """The candidates that were trained on all folds."""
        return [entry for entry in self.entries if entry.n_folds == self.folds and not entry.problem]

    def as_csv(self) -> bytes:
        """Return the table, with a row for the mix."""
        return csv_for_people(self._rows())

    def _rows(self) -> Iterator[Sequence[object]]:
        names = list(self.metrics)
        yield [
            "model", "weight", "folds", "log_loss", *names, "low", "high", "behind", "behind_low", "behind_high",
            "p_corrected", "seconds", "size_mb", "ms_per_item", "problem",
        ]  # fmt: skip
        chosen = self.chosen
        if self.metrics:
            yield [
                "mix", 1.0, self.folds, self.log_loss, *self.metrics.values(), *self.interval, "", "", "", "",
                sum(entry.seconds for entry in chosen), sum(entry.size_mb for entry in chosen),
                sum(entry.ms_per_item for entry in chosen), "",
            ]  # fmt: skip
        for entry in self.entries:
            behind = entry.behind
            yield [
                entry.name, entry.weight, entry.n_folds, entry.log_loss,
                *(entry.metrics.get(name, math.nan) for name in names), *entry.interval,
                *((behind.value, behind.low, behind.high, behind.p) if behind else ("", "", "", "")),
                entry.seconds, entry.size_mb, entry.ms_per_item, entry.problem,
            ]  # fmt: skip

    @property
    def reasons(self) -> list[str]:
        """What was chosen and why, in sentences."""
        if not self.metrics:
            return []
        title, chosen = metric_title(self.main), self.chosen
        shares = ", ".join(f"{entry.name} ({entry.weight:.2f})" for entry in chosen)
        kept = f", {self.bounds}," if self.bounds else ""
        sentences = [
            f"{'The mix of' if len(chosen) > 1 else 'Chosen:'} {shares}. Of what the candidates on all folds can be "
            f"joined to{kept} it has the lowest log loss on rows held out, {self.log_loss:.3f}."
        ]
        sentences += self._against_best(title)
        stopped = [entry for entry in self.entries if entry.n_folds < self.folds and not entry.problem]
        failed = sum(bool(entry.problem) for entry in self.entries)
        told = [
            f"{len(self.finished)} trained on all {self.folds} folds",
            f"{len(stopped)} stopped sooner, behind others or for lack of time" if stopped else "",
            f"{failed} diverged" if failed else "",
            f"{n_left} not tried" if (n_left := self.n_candidates - len(self.entries)) else "",
        ]
        sentences.append(f"Of {self.n_candidates} candidates, {', '.join(filter(None, told))}.")
        return sentences

    def _against_best(self, title: str) -> Iterator[str]:
        """Say whether what was chosen is better, or worse, than the best single model by the main metric."""
        singles = [entry for entry in self.finished if entry.behind is not None]
        best = max(singles, key=lambda entry: entry.metrics[self.main], default=None)
        if best is not None and self.chosen != [best]:
            what = "mix" if len(self.chosen) > 1 else "chosen model"
            verdict = _verdict(best.behind, f"the best single model by it, {best.name}")
            yield f"{title} of the {what}: {self.metrics[self.main]:.3f}. {verdict}"


def _verdict(behind: Difference | None, what: str) -> str:
    """Say what a paired test shows of the mix against something: "better" only where it holds."""
    assert behind is not None
    figures = f"{behind.value:+.3f} [{behind.low:+.3f}, {behind.high:+.3f}], corrected p {behind.p:.2g}"
    if behind.p <= ALPHA:
        return f"It is {'better' if behind.value > 0 else 'worse'} than {what}: {figures}."
    other = "better" if behind.value > 0 else "worse"
    return f"These rows do not show that it is {other} than {what}: {figures}."
