"""Hostile raw data of every reader: it is read, or refused in one line."""

import pytest

from adversarial.datasets import write_dataset
from adversarial.hostile import try_each
from adversarial.judge import Counts
from adversarial.sizes import SEED, size

BATCH = 50


def attack(forks, folder, n):
    counts = Counts()
    for start in range(0, n, BATCH):
        seeds = [SEED * 1_000_000 + i for i in range(start, min(n, start + BATCH))]
        made = [(*write_dataset(folder / str(seed), seed), str(folder / str(seed))) for seed in seeds]
        try_each(forks, counts, "read", (), [each[1:] for each in made], [about for about, *_ in made], folder)
    return counts.report("datasets")


def test_some_hostile_datasets_are_read_or_refused_in_one_line(data_forks, tmp_path):
    wrong = attack(data_forks, tmp_path, 40)
    assert not wrong, wrong


@pytest.mark.slow
def test_hostile_datasets_are_read_or_refused_in_one_line(data_forks, tmp_path):
    wrong = attack(data_forks, tmp_path, size(2000, 300))
    assert not wrong, wrong
