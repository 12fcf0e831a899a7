"""One fault of one file of a workspace: every command gives the undamaged result, or says what is wrong."""

import os
import random

import pytest

from adversarial import workspaces
from adversarial.faults import FAULTS, suits
from adversarial.judge import CLEAR, Counts, notes, verdict
from adversarial.readers import READERS, result
from adversarial.sizes import SCALE, SEED, size

NOBODY = 65534
PARTS = 2  # so that two processes share the work
ALWAYS = ("verify", "verify int8", "evaluate", "predict", "train-head", "retrieve", "inspect", "runs")
OTHERS = [name for name in READERS if name not in ALWAYS]


def files_of(folder):
    """Return the files of a workspace that a result may depend on."""
    root = folder / "workspace"
    return sorted(path.relative_to(folder) for path in root.rglob("*") if path.is_file() and "/.lock" not in str(path))


class Attack:
    """Faults in copies of a workspace, and what each command makes of them."""

    def __init__(self, forks, whole, older, work):
        self.forks, self.whole, self.older, self.work = forks, whole, older, work
        workspaces.copy(whole, work)
        self.expected, self.notes = {}, {}
        for name in READERS:
            ended, value = result(forks, work, name, warm=True)
            assert ended.code == 0, (name, ended)
            self.expected[name], self.notes[name] = value, notes(ended)

    def one(self, counts: Counts, fault: str, file, seed: int) -> None:
        """Make a fault, and judge every command."""
        case = f"{fault}: {file} (seed {seed})"
        workspaces.copy(self.whole / "workspace", self.work / "workspace")
        rng, path = random.Random(seed), self.work / file
        before = path.read_bytes()
        if FAULTS[fault](path, rng, self.older / file) is False:
            return
        options = {"timeout": 30, "memory": 1_000_000_000}
        if fault == "unreadable":
            if os.geteuid() == 0:
                open_to_all(self.work)
            options["conditions"] = {"user": NOBODY}
        named = READERS_OF.get(file.parts[2] if len(file.parts) > 2 else "", ())
        names = [*ALWAYS, *named] if SCALE else [*ALWAYS]
        names += [name for name in OTHERS if name not in names and rng.random() < 0.3]
        verdicts = {}
        for name in names:
            ended, value = result(self.forks, self.work, name, **options)
            verdicts[name] = verdict(ended, value, [self.expected[name]], self.notes[name])
            if name.startswith("verify") and ended.code == 1 and not ended.err and ended.out:
                verdicts[name] = CLEAR  # its table names the damage
            stopped = ended.stopped
            counts.add(verdicts[name], f"{case}: cachefuse {' '.join(READERS[name])}")
            if stopped:
                return  # the others would wait as long
            if fault not in SPECIAL and path.is_file() and not path.is_symlink() and path.read_bytes() == before:
                return  # a command made it anew, or the fault changed nothing


SPECIAL = ("40 GB", "a FIFO", "a link to /dev/zero", "unreadable")
READERS_OF = {"quant.zarr": ("predict int8", "train-head int8"), "swept": ("sweep",)}


def open_to_all(folder):
    """Let every user write in a folder, so that only the fault refuses."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink() and path.stat().st_mode & 0o777:
            path.chmod(0o777 if path.is_dir() else 0o666)
    for parent in folder.parents:
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 0o005:
            parent.chmod(parent.stat().st_mode | 0o055)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_no_fault_of_a_file_is_served_as_right(forks, whole, older, tmp_path, part):
    attack, counts = Attack(forks, whole, older, tmp_path / "work"), Counts()
    files = files_of(whole)
    rng = random.Random(SEED)
    cases = [(fault, file) for file in files for fault in FAULTS if suits(fault, file)]
    rng.shuffle(cases)
    tried = list(enumerate((cases * 2)[: size(1000, 25)]))
    for i, (fault, file) in tried[part::PARTS]:
        attack.one(counts, fault, file, SEED * 100_000 + i)
    wrong = counts.report(f"commands after the faults of part {part + 1}")
    assert not wrong, wrong
