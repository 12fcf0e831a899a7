"""Every command that writes, interrupted at any moment: readers are right, and the next run ends as if undisturbed."""

import json
import random

import pytest

from adversarial import workspaces
from adversarial.judge import CLEAR, NOTED, SAME, Counts, difference, fault_of, left, leftovers, verdict
from adversarial.kills import WRITERS, way
from adversarial.readers import READERS, result
from adversarial.sizes import SEED, size

# Two others keep what they computed, and inspect shows how far a command came.
ONLY_READ = [name for name in READERS if name not in ("sweep", "retrieve", "inspect")]
INTERRUPTED = {"kill at a call": -9, "kill": -9, "SIGTERM": -15}


class Attack:
    """One command that writes: what it does undisturbed, and what it does after it was interrupted."""

    def __init__(self, forks, whole, states, work, name):
        self.forks, self.work, self.writer = forks, work, WRITERS[name]
        self.name = name
        self.before = states / self.writer.step if self.writer.step else whole
        self.begin()
        log = work.with_name("calls")
        log.unlink(missing_ok=True)
        ended = forks.run(*self.writer.args, cwd=work, timeout=300, warm=True, conditions={"count_calls": str(log)})
        assert ended.code == 0, (name, ended)
        self.begin()
        ended = forks.run(*self.writer.args, cwd=work, timeout=300)
        self.n_calls, self.seconds, self.expected = log.stat().st_size, ended.seconds, left(work)
        self.after = workspaces.copy(work, work.with_name("after"))
        self.readings = {}  # the results before and after, by reader

    def begin(self):
        workspaces.copy(self.before, self.work)
        self.writer.prepare(self.work)

    def right(self, reader):
        """Return what a reader gives before the command and after it."""
        if reader not in self.readings:
            self.begin()
            before = self.read(reader)[1]
            workspaces.copy(self.after, self.work)
            self.readings[reader] = before, self.read(reader)[1]
        return self.readings[reader]

    def read(self, reader):
        return result(self.forks, self.work, reader, timeout=60)

    def one(self, counts: Counts, seed: int) -> None:
        """Interrupt the command once, read what is there, and run it again."""
        rng = random.Random(seed)
        reader = rng.choice(ONLY_READ)
        right = self.right(reader)
        self.begin()
        kind, described, options = way(rng, self.n_calls, self.seconds)
        case = f"{self.name}, {described} (seed {seed}): cachefuse {' '.join(self.writer.args)}"
        ended = self.forks.run(*self.writer.args, cwd=self.work, timeout=120, **options)
        found = self.interrupted(kind, ended)
        if found != SAME:
            counts.add(found, case)
            return
        ended, value = self.read(reader)
        found = verdict(ended, value, right)
        if reader.startswith("verify") and ended.code == 1 and not ended.err and ended.out:
            found = CLEAR
        if found not in (SAME, CLEAR, NOTED):
            counts.add(found, f"{case}; then cachefuse {' '.join(READERS[reader])}")
            return
        ended = self.forks.run(*self.writer.args, cwd=self.work, timeout=120)
        counts.add(self.ended_well(ended), f"{case}; then the same again")

    def interrupted(self, kind, ended) -> str:
        if ended.code in (0, INTERRUPTED.get(kind)) and not ended.stopped and "Traceback" not in ended.err:
            return SAME
        return fault_of(ended) or SAME

    def ended_well(self, ended) -> str:
        if fault_of(ended) or ended.code:
            return fault_of(ended) or f"exit code {ended.code}: {(ended.err or ended.out)[-300:]}"
        found = left(self.work)
        if found != self.expected:
            return f"another result: {json.dumps(difference(found, self.expected))[:400]}"
        if names := leftovers(self.work):
            return f"left over: {', '.join(names[:5])}"
        return SAME


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_no_interruption_of_a_command_changes_what_it_ends_with(forks, whole, states, tmp_path, name):
    counts, share = Counts(), WRITERS[name].weight / sum(writer.weight for writer in WRITERS.values())
    attack = Attack(forks, whole, states, tmp_path / "work", name)
    first = SEED * 100_000 + 1000 * list(WRITERS).index(name)
    for i in range(size(round(1000 * share), 1)):
        attack.one(counts, first + i)
    wrong = counts.report(f"kills of {name}")
    assert not wrong, wrong
