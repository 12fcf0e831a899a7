"""Measure the pipeline around an encoder against the encoder alone; random weights cost the same arithmetic."""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from cachefuse.bench.base import Bench
from cachefuse.bench.timing import BenchRow, in_turns, rates, timed
from cachefuse.data.column import Column
from cachefuse.data.dataset import Dataset
from cachefuse.data.images import FileImage
from cachefuse.data.manifest import parse_manifest
from cachefuse.encoders import open_encoder
from cachefuse.extraction.extract import WINDOW_BATCHES, ExtractProgress, extract
from cachefuse.extraction.pipeline import encode_prepared, prepare_source
from cachefuse.files import JsonObject

BATCH = 32
IMAGE_FILES = 64  # on disk; a dataset with more samples repeats them
IMAGE_SIZE = (400, 300)
MAX_TOKENS = 256
MEAN_TOKENS, SPREAD = 100, 0.6  # of a log-normal distribution, as of movie plots


def extract_images(bench: Bench) -> BenchRow:
    """Measure `extract` from JPEG files, after its first batch, against only the encoder's forward on prepared tensors.

    Only our side reads and decodes, resizes and normalises, and writes a store with its syncs. The first batch of a new
    model is slower; neither side's time contains it.
    """
    on_cuda = bench.device.startswith("cuda")
    n_images = bench.sizes.images_on_cuda if on_cuda else bench.sizes.images
    dataset = make_images(bench.folder / "images", n_images)
    spec = save_clip(bench.folder / "clip", bench.sizes.image_layers)
    tower: Any = open_encoder(spec, bench.device)["image"]
    images = dataset.modalities["image"].feature_sources()[:BATCH]
    ready = tower.stack([prepare_source(tower, image) for image in images])

    def ours() -> float:
        starts: list[float] = []

        def on_progress(progress: ExtractProgress) -> None:
            if progress.encoder and progress.done >= BATCH and not starts:
                starts.append(time.perf_counter())

        path = bench.folder / "images.zarr"
        extract(dataset, [spec], path, device=bench.device, batch_size=BATCH, on_progress=on_progress)
        seconds = time.perf_counter() - starts[0]
        shutil.rmtree(path)
        return seconds

    def baseline() -> None:
        with torch.inference_mode(), torch.autocast(tower.device.type, tower.half, enabled=on_cuda):
            for start in range(BATCH, n_images, BATCH):
                tower.model.encode_image(ready[: n_images - start], normalize=False)
        if on_cuda:
            torch.cuda.synchronize(tower.device)

    baseline()
    pairs = in_turns(ours, timed(baseline), bench.sizes.pairs)
    goal = None if on_cuda else 0.92  # a GPU waits for the decoding
    return rates(pairs, n_images - BATCH, "extract", "extract ViT-B-32 / its forward", "images/s", goal=goal)


def encode_texts(bench: Bench) -> BenchRow:
    """Measure texts encoded as by `extract`, in batches of similar length, against texts padded to ``MAX_TOKENS``."""
    tower: Any = open_encoder(save_bert(bench.folder / "bert", bench.sizes.text_layers), bench.device)["text"]
    lengths = bench.generator.lognormal(math.log(MEAN_TOKENS) - SPREAD**2 / 2, SPREAD, bench.sizes.texts)
    prepared = [tower.prepare("word " * max(1, int(length))) for length in lengths]  # truncated to MAX_TOKENS
    ids = torch.full((len(prepared), MAX_TOKENS), tower.pad_id)  # (N, T)
    for row, text in zip(ids, prepared, strict=True):
        row[: tower.length(text)] = torch.tensor(text.windows[0])
    mask = torch.arange(MAX_TOKENS) < torch.tensor([[tower.length(text)] for text in prepared])

    def ours() -> None:
        for start in range(0, len(prepared), WINDOW_BATCHES["pooled"] * BATCH):
            encode_prepared(tower, prepared[start : start + WINDOW_BATCHES["pooled"] * BATCH], ("pooled",), BATCH)

    def baseline() -> None:
        with torch.inference_mode(), torch.autocast(tower.device.type, tower.half, enabled=tower.device.type == "cuda"):
            for batch_ids, real in zip(ids.split(BATCH), mask.split(BATCH), strict=True):
                real = real.to(tower.device).long()
                hidden = tower.model(input_ids=batch_ids.to(tower.device), attention_mask=real).last_hidden_state
                ((hidden.float() * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)).cpu()

    encode_prepared(tower, prepared[:BATCH], ("pooled",), BATCH)
    pairs = in_turns(timed(ours), timed(baseline), bench.sizes.pairs)
    return rates(pairs, len(prepared), "text", f"texts by length / padded to {MAX_TOKENS}", "texts/s", goal=2.0)


def make_images(folder: Path, n: int) -> Dataset:
    """Write JPEG files, smooth with some noise, like photos, and return a dataset of ``n`` images from them."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    files = [folder / f"{i:03d}.jpg" for i in range(min(n, IMAGE_FILES))]
    for file in files:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        smooth = np.asarray(coarse.resize(IMAGE_SIZE, Image.Resampling.BICUBIC))  # (H, W, 3)
        pixels = smooth + rng.normal(0, 6, (*smooth.shape[:2], 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=90)
    return Dataset(
        manifest=parse_manifest('name = "images"\ntask = "retrieval"\nreader = { kind = "folder" }', "images.toml"),
        classes=(),
        ids=[f"{i:06d}" for i in range(n)],
        splits=np.repeat("train", n),
        targets=np.full(n, -1, np.int32),
        modalities={"image": Column([FileImage(files[i % len(files)]) for i in range(n)])},
        name="images",
    )


def save_clip(folder: Path, layers: int) -> str:
    """Save a CLIP with the first ``layers`` of ViT-B-32's image tower, and a tiny text tower."""
    config: JsonObject = open_clip.get_model_config("ViT-B-32")
    config["vision_cfg"]["layers"] = layers
    config["text_cfg"] |= {"width": 64, "heads": 1, "layers": 1}
    folder.mkdir()
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    colours = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": colours}))
    return f"clip:{folder}"


def save_bert(folder: Path, layers: int) -> str:
    """Save a BERT with MiniLM's widths and ``layers`` layers, with a tokenizer of a few words."""
    words = ("word", *(f"word{i}" for i in range(20)))
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3} | {word: i for i, word in enumerate(words, 4)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends: list[str | tuple[str, int]] = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocab),
        hidden_size=384,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=MAX_TOKENS,
    )
    config.save_pretrained(folder)
    save_file(transformers.BertModel(config, add_pooling_layer=False).state_dict(), folder / "model.safetensors")
    return f"hf:{folder}"
