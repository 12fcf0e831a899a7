"""A small workspace with all that cachefuse writes, and the commands that write it.

112 samples, of which 16 have no labels, in a table with files of images. Three encoders, tokens and ids; a second store
with int8 tokens. A head, a head over folds, one of tokens, an ensemble, an alignment and a tuned head; a sweep.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ("a", "big", "small", "red", "green", "blue", "circle", "square", "on", "two")
TABLE = """
name = "{name}"
task = "multilabel"
min_labels = 1
splits = {{ val = {{ from = "train", fraction = 0.25 }} }}
[reader]
kind = "table"
files = {{ train = "train.csv", test = "test.csv" }}
id = "id"
image = "images/{{id}}.png"
text = "text"
labels = "labels"
separator = " "
"""
N_TRAIN, N_TEST = 96, 16
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
MODELS = "--encoder", "hf:./bert", "--encoder", "hf:./vit"
QUICK = "--head", "linear", "--epochs", "3"
STEPS = {  # what writes the workspace, in order
    "extract": ("extract", "--dataset", "./mine.toml", "--encoder", "classic"),
    "extract tokens": ("extract", "--dataset", "./mine.toml", *MODELS, "--views", "pooled,tokens,ids"),
    "extract int8": ("extract", "--dataset", "./quant.toml", *MODELS, "--views", "pooled,tokens", "--dtype", "int8"),
    "train-head int8": ("train-head", "--dataset", "quant", *QUICK),
    "align": ("align", "--dataset", "mine", *MODELS, "--epochs", "2", "--width", "16", "--seed", "1"),
    "train-head": ("train-head", "--dataset", "mine", *QUICK),
    "train-head folds": ("train-head", "--dataset", "mine", *QUICK, "--folds", "2", "--encoder", "classic"),
    "train-head tokens": (
        "train-head",
        "--dataset",
        "mine",
        "--fusion",
        "cma",
        "--fusion-options",
        "width=8",
        "--fusion-options",
        "heads=2",
        "--epochs",
        "1",
        *MODELS,
    ),
    "train-head seeds": ("train-head", "--dataset", "mine", *QUICK, "--members", "2", "--seed", "5"),
    "ensemble": ("ensemble", "mine-sum-linear-asl-1", "mine-sum-linear-asl-3"),
    "fine-tune": ("fine-tune", "--dataset", "mine", "--epochs", "2"),
    "retrieve": ("retrieve", "--text", "a red circle", "-k", "3"),  # keeps the aligned features of the images
    "sweep": (
        "sweep",
        "--dataset",
        "mine",
        *QUICK,
        "--encoder",
        "classic",
        "--grid",
        "lr=0.01,0.02",
        "--seeds",
        "2",
        "--name",
        "swept",
    ),
}


def write_raw(folder: Path, seed: int = 0) -> None:
    """Write the raw data, the manifests and two small random encoders."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    rows = []
    for row in range(N_TRAIN + N_TEST):
        colour, size = rng.integers(3), rng.integers(2)
        pixels = rng.integers(0, 80, (20 + row % 5, 24, 3), dtype=np.uint8)
        pixels[4 : 12 + 6 * size, 4:16, colour] += 150
        Image.fromarray(pixels).save(folder / "images" / f"r{row}.png")
        text = " ".join([WORDS[1 + size], WORDS[3 + colour], *rng.choice(WORDS, rng.integers(0, 6))])
        rows.append((f"r{row}", text, f"{WORDS[3 + colour]} {WORDS[1 + size]}"))
    write_table(folder, rows)
    for name in ("mine", "quant"):
        (folder / f"{name}.toml").write_text(TABLE.format(name=name))
    write_models(folder)


def write_table(folder: Path, rows) -> None:
    train = ["id,text,labels", *map(",".join, rows[:N_TRAIN])]
    test = ["id,text", *(",".join(row[:2]) for row in rows[N_TRAIN:])]
    (folder / "train.csv").write_text("\n".join(train) + "\n")
    (folder / "test.csv").write_text("\n".join(test) + "\n")


def write_models(folder: Path) -> None:
    """Write a text encoder of ragged tokens and an image encoder, for ``hf:``."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "bert")
    bert = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=40, **TINY)
    transformers.BertModel(bert, add_pooling_layer=False).save_pretrained(folder / "bert")
    vit = transformers.ViTConfig(image_size=16, patch_size=8, **TINY)
    transformers.ViTModel(vit, add_pooling_layer=False).save_pretrained(folder / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")


def make(folder: Path, forks, steps=tuple(STEPS), states: Path | None = None, seed: int = 0) -> Path:
    """Make the workspace in a new folder, and return the folder; keep in ``states`` what was there before each step."""
    write_raw(folder, seed)
    for name in steps:
        if states is not None:
            copy(folder, states / name)
        ended = forks.run(*STEPS[name], cwd=folder, timeout=600, warm=True)
        assert ended.code == 0, (name, ended)
    return folder


def copy(folder: Path, to: Path) -> Path:
    """Copy a workspace's folder, with its times, over what is there."""
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(folder, to, symlinks=True)
