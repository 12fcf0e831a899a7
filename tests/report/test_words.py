from dataclasses import replace

import pytest

from cachefuse.metrics import METRICS, metric_title
from cachefuse.report.formatting import count, cut, ends, figure, interval, signed, splits_note
from cachefuse.report.provenance import train_command
from cachefuse.runs.train import train_head


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({}, "not trained on val, but val chose the epoch. Each part of val has thresholds"),
        ({"patience": 0, "thresholds": "none"}, "not trained on val."),
        ({"folds": 2, "thresholds": "none"}, "each fold is predicted by models trained on the other folds."),
        ({"refit": True, "patience": 0}, " Afterwards, the models that predict were trained on train and val."),
        ({"folds": 2}, "models trained on the other folds, with thresholds chosen on the other folds."),
    ],
)
def test_how_the_figures_came_about_is_told(options, note, store, quick):
    assert note in splits_note(train_head(store, replace(quick, **options)))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (figure(0.12345), "0.123"), (figure(float("nan")), "\u2013"), (figure(None), "\u2013"),
        (signed(-0.0125), "\u22120.013"), (signed(0.5), "+0.500"), (signed(float("nan")), "\u2013"),
        (interval((0.1, 0.2)), "0.100 to 0.200"), (interval((float("nan"),) * 2), "\u2013"),
        (count(9999), "9999"), (count(12_345), "12k"), (count(2_500_000), "2M"),
        (cut("short"), "short"), (cut("a" * 81), "a" * 79 + "…"), (ends("0123456789" * 3), "0123456789…90123456789"),
    ],
)  # fmt: skip
def test_figures_and_names_as_they_are_written(written, expected):
    assert written == expected


def test_every_metric_has_a_title():
    assert all(metric_title(name) == metric.title != "" for name, metric in METRICS.items())
    assert metric_title("a_metric_of_nobody") == "a_metric_of_nobody"


def test_the_command_quotes_what_a_shell_would_break(saved):
    features = {
        name: tuple(replace(used, encoder="hf:a model; rm -rf $HOME") for used in group)
        for name, group in saved.members[0].features.items()
    }
    run = replace(saved, members=[replace(saved.members[0], features=features)])
    assert train_command(run).count("'hf:a model; rm -rf $HOME'") == 1
