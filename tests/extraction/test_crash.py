"""Real processes, interrupted and killed: the next run goes on and ends as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import parse_manifest
from cachefuse.errors import CacheError
from cachefuse.extraction.extract import extract
from cachefuse.store.format import read_lines
from cachefuse.store.store import FeatureStore
from cachefuse.workspace import WorkspacePaths
from fixtures.messages import naming, says

MANIFEST = """
name = "crash"
task = "multilabel"

[reader]
kind = "shapes"
train = 800
test = 200
"""
PROGRAM = str(Path(sys.executable).with_name("cachefuse"))
PATIENCE = 600  # seconds, on a machine however busy


@pytest.fixture
def start(tmp_path):
    """Start `cachefuse extract` on a workspace; what still runs is killed at the end."""
    (tmp_path / "crash.toml").write_text(MANIFEST)
    started = []

    def start(workspace, *options):
        options = options or ("--encoder", "classic")
        process = subprocess.Popen(
            [PROGRAM, "extract", "--dataset", "./crash.toml", *options, "--workspace", workspace,
             "--no-lexical", "--device", "cpu", "--batch-size", "8"],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(process, path):
    """Wait until a running process has made a file."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def extract_here(tmp_path, store):
    """The same extract, undisturbed and in this process."""
    dataset = load_dataset(parse_manifest(MANIFEST, "crash.toml"), tmp_path)
    return extract(dataset, ["classic"], store, device="cpu", batch_size=8)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(start, tmp_path):
    extract_here(tmp_path, tmp_path / "undisturbed.zarr")
    store = WorkspacePaths(tmp_path / "killed").store("crash")
    process = start("killed")
    wait_for(process, store / "features" / "classic" / "image" / "journal.jsonl")
    process.kill()
    process.communicate()
    with pytest.raises(CacheError, match="extract"):
        FeatureStore(store).open_features("classic", "image").read()
    extract_here(tmp_path, store)
    assert contents(store) == contents(tmp_path / "undisturbed.zarr")


@pytest.mark.slow
def test_interrupted_and_killed_runs_end_with_the_same_bytes(start, tmp_path, tools):
    undisturbed = tmp_path / "undisturbed.zarr"
    extract_here(tmp_path, undisturbed)
    store = WorkspacePaths(tmp_path / "killed").store("crash")
    journal = store / "features" / "classic" / "image" / "journal.jsonl"

    process = start("killed")
    wait_for(process, journal)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert says(err, "note interrupted")
    assert "Traceback" not in err
    assert out == ""
    with pytest.raises(CacheError, match="extract"):
        FeatureStore(store).open_features("classic", "image").read()

    rng = random.Random(0)
    for _ in range(2):
        size = journal.stat().st_size
        process = start("killed")
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and journal.stat().st_size == size and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
    process = start("killed")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert says(err, "rows")
    assert tools.files(store) == tools.files(undisturbed)


@pytest.mark.slow
def test_a_kill_while_the_store_is_made_blocks_nothing(start, tmp_path):
    cache = tmp_path / "killed" / "cache"
    process = start("killed")
    wait_for(process, cache)
    process.kill()
    process.communicate()
    extract_here(tmp_path, cache / "crash.zarr")
    assert WorkspacePaths(tmp_path / "killed").stores == [cache / "crash.zarr"]
    assert {path.name for path in cache.iterdir()} <= {"crash.zarr", ".crash.zarr.lock", ".crash.zarr.writer"}


@pytest.mark.slow
def test_a_second_writer_is_refused_while_the_first_lives(start, tmp_path):
    store = tmp_path / "shared" / "cache" / "crash.zarr"
    process = start("shared")
    wait_for(process, store / "features" / "classic" / "image" / "zarr.json")
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(CacheError, match=naming(f"{process.pid}")):
        extract_here(tmp_path, store)
    process.kill()
    process.communicate()
    extract_here(tmp_path, store)


# Killed at random moments


@dataclass
class Killer:
    """Runs `cachefuse extract` to its end, however often it is killed on the way."""

    start: Callable[..., subprocess.Popen]
    cache: Path
    options: tuple[str, ...]
    rng: random.Random
    longest: float  # seconds of a whole run, after its start

    def kill_once(self, workspace: str) -> bool:
        """Start a run and kill it at a random moment; return whether it had ended before."""
        process = self.start(workspace, *self.options)
        wait_for(process, self.cache / workspace / "cache" / ".crash.zarr.writer")
        try:
            _, err = process.communicate(timeout=self.rng.uniform(0, self.longest))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return False
        assert process.returncode == 0, err
        return True

    def finish(self, workspace: str) -> Path:
        """Run undisturbed, and return the store."""
        process = self.start(workspace, *self.options)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        return self.cache / workspace / "cache" / "crash.zarr"


def contents(store):
    """The files of a store but its journals, and what those say; a torn line and one that came again say nothing."""
    files = {
        str(path.relative_to(store)): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file() and path.name != "journal.jsonl" and path != store / "zarr.json"
    }
    for journal in store.rglob("journal.jsonl"):
        lines = {(line["view"], line["block"]): line for line in read_lines(journal)}
        files[str(journal.relative_to(store))] = sorted(lines.items())
    return files


def save_models(folder):
    """A text encoder with ragged tokens and an image encoder, small and random; return their specs."""
    torch.manual_seed(0)
    vocab = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "a", "big", "small", "red", "blue", "one", "on"))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "bert")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    bert = transformers.BertConfig(vocab_size=len(vocab), max_position_embeddings=40, **small)
    transformers.BertModel(bert, add_pooling_layer=False).save_pretrained(folder / "bert")
    vit = transformers.ViTConfig(image_size=32, patch_size=8, **small)
    transformers.ViTModel(vit, add_pooling_layer=False).save_pretrained(folder / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    return "--encoder", "hf:./bert", "--encoder", "hf:./vit", "--views", "pooled,tokens,ids"


def cut_newest(store, rng):
    """Truncate the newest files of features, as a disk that lied about what it holds may after a power cut."""
    files = [path for path in (store / "features").rglob("*") if path.is_file() and path.suffix != ".json"]
    files.sort(key=lambda path: path.stat().st_mtime_ns)
    for path in files[-rng.randint(1, 4) :]:
        os.truncate(path, rng.randint(0, path.stat().st_size))


def kill_and_compare(start, tmp_path, options, n_kills, cut=False, seed=0):
    """Kill runs until ``n_kills`` of them died, with a new store for each that ended; return the stores made."""
    rng = random.Random(seed)
    killer = Killer(start, tmp_path, options, rng, 0)
    begun = time.monotonic()
    if options[1:] == ("classic",):
        extract_here(tmp_path, tmp_path / "undisturbed.zarr")
        expected, killer.longest = contents(tmp_path / "undisturbed.zarr"), time.monotonic() - begun
    else:
        expected = contents(killer.finish("undisturbed"))
        killer.longest = (time.monotonic() - begun) / 2  # the rest of it goes to imports
    killed = made = 0
    while killed < n_kills:
        workspace = f"killed-{made}"
        if killer.kill_once(workspace):
            assert contents(tmp_path / workspace / "cache" / "crash.zarr") == expected
            made += 1
            continue
        killed += 1
        if cut and rng.random() < 0.5:
            cut_newest(tmp_path / workspace / "cache" / "crash.zarr", rng)
    assert contents(killer.finish(f"killed-{made}")) == expected
    return made + 1


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bytes(start, tmp_path):
    kill_and_compare(start, tmp_path, ("--encoder", "classic"), 4)


@pytest.mark.slow
@pytest.mark.skipif("CACHEFUSE_CRASH_KILLS" not in os.environ, reason="set CACHEFUSE_CRASH_KILLS to a number of kills")
@pytest.mark.parametrize("cut", [False, True], ids=["killed", "killed and cut short"])
def test_runs_killed_many_times_end_with_the_same_bytes(start, tmp_path, cut):
    options = save_models(tmp_path)
    kill_and_compare(start, tmp_path, options, int(os.environ["CACHEFUSE_CRASH_KILLS"]), cut)
