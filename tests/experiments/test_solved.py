"""Fusions that are solved directly beside others, in a comparison."""

from rich.console import Console

from cachefuse.experiments.compare import compare
from cachefuse_cli.shared.sweep_tables import sweep_table
from fixtures.messages import says


def test_they_are_compared_with_others(toy_store, folder, monkeypatch):
    """The budget of epochs is of the others, and they have no steps."""
    monkeypatch.setattr("cachefuse.experiments.costs.SECONDS", 0.0)
    monkeypatch.setattr("cachefuse.experiments.sweep.RESAMPLES", 20)
    result = compare(
        toy_store(), folder=folder, methods=("kernel", "logistic", "sum"), folds=2, epochs=1, batch_size=16
    )
    assert [len(setting.trials) for setting in result.settings] == [1, 1, 1]
    kernel, logistic, summed = (setting.costs for setting in result.settings)
    assert kernel.steps_per_second == logistic.steps_per_second == 0 < summed.steps_per_second
    assert min(kernel.ms_per_item, logistic.size_mb) > 0
    assert len(result.standings) == 3
    console = Console(width=80)
    with console.capture() as shown:
        console.print(sweep_table(result))
    assert says(shown.get(), "kernel logistic sum")
