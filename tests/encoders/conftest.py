"""Small models with random weights, saved as users' folders and files are: one way to open each kind of encoder."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from cachefuse.alignment.config import AlignConfig
from cachefuse.alignment.model import Aligner
from cachefuse.alignment.run import Alignment, AlignmentSide
from cachefuse.encoders import open_encoder
from cachefuse.encoders.base import EncoderSpec, Tower
from cachefuse.store.format import provenance_key
from cachefuse.training.loop import History

WORDS = ("the", "a", "red", "blue", "circle", "square", "big", "small", "left", "right")


def save_tokenizer(folder: Path) -> int:
    """Save a word-level tokenizer with BERT's special tokens; return its vocabulary's size."""
    vocab = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return len(vocab)


def save_bert(folder: Path) -> str:
    size = save_tokenizer(folder)
    config = transformers.BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return f"hf:{folder}"


def save_t5(folder: Path) -> str:
    size = save_tokenizer(folder)
    config = transformers.T5Config(
        vocab_size=size, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    transformers.T5Model(config).save_pretrained(folder)
    return f"hf:{folder}"


def save_processor(folder: Path) -> None:
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def save_vit(folder: Path) -> str:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    save_processor(folder)
    return f"hf:{folder}"


def save_resnet(folder: Path) -> str:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    transformers.ResNetModel(config).save_pretrained(folder)
    save_processor(folder)
    return f"hf:{folder}"


CLIP_CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def save_clip(folder: Path, **more: object) -> str:
    config = {**CLIP_CONFIG, **more}
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    save_file(kind(**config).state_dict(), folder / "open_clip_model.safetensors")
    settings = {"model_cfg": {**CLIP_CONFIG, **more}, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return f"clip:{folder}"


def save_custom_clip(folder: Path) -> str:
    return save_clip(folder, custom_text=True)


def save_aligned(folder: Path) -> str:
    """Save an alignment, untrained, of a ViT and a BERT."""
    sides = []
    for modality, save in (("image", save_vit), ("text", save_bert)):
        (folder / modality).mkdir()
        source = save(folder / modality)
        tower = open_encoder(source)[modality]
        key = provenance_key({**tower.provenance, "dtype": "float16"})
        sides.append(AlignmentSide(modality, EncoderSpec.parse(source).short, source, key, "float16", tower.width))
    config = AlignConfig(width=16)
    model = Aligner([side.width for side in sides], config)
    run = Alignment("tiny", "mine", config, (sides[0], sides[1]), model, History())
    return f"aligned:{run.save(folder / 'runs')}"


def save_timm(name: str) -> Callable[[Path], str]:
    def save(folder: Path) -> str:
        save_file(timm.create_model(name).state_dict(), folder / "weights.safetensors")
        return f"timm:{name}@{folder}/weights.safetensors"

    return save


MAKERS: dict[str, Callable[[Path], str]] = {
    "aligned": save_aligned,
    "classic": lambda folder: "classic",
    "clip": save_clip,
    "clip-custom-text": save_custom_clip,
    "lexical": lambda folder: "lexical",
    "hf-bert": save_bert,
    "hf-t5": save_t5,
    "hf-vit": save_vit,
    "hf-resnet": save_resnet,
    "timm-vit": save_timm("test_vit"),
    "timm-cnn": save_timm("test_resnet"),
}


@dataclass
class Case:
    """An encoder on disk: its name in MAKERS, its folder, its spec, and its towers, open."""

    name: str
    folder: Path
    spec: str
    towers: dict[str, Tower]


@pytest.fixture(scope="session")
def makers() -> dict[str, Callable[[Path], str]]:
    return MAKERS


@pytest.fixture(scope="session", params=MAKERS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    spec = MAKERS[request.param](folder)
    return Case(request.param, folder, spec, open_encoder(spec))


@pytest.fixture(scope="session")
def samples() -> dict[str, list]:
    """Six images of different shapes and six texts of different lengths."""
    rng = np.random.default_rng(0)
    sizes = ((40, 60), (300, 200), (64, 64), (33, 90), (128, 100), (224, 224))
    return {
        "image": [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes],
        "text": [" ".join(rng.choice(WORDS, n)) for n in (1, 2, 3, 5, 9, 80)],
    }


BATCHES = ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 2], [4, 0, 3], [1] * 33, [0, 1, 2, 3, 4, 5] * 11)


@pytest.fixture(scope="session")
def batch_effect() -> Callable[[Tower, list], float]:
    """How far a sample's features, in batches of other sizes, neighbours and positions, are from those it has alone:
    the largest difference of any view, relative to the largest feature of the sample."""

    def measure(tower: Tower, samples: list) -> float:
        prepared = [tower.prepare(sample) for sample in samples]
        alone = [tower.encode([one], tower.views) for one in prepared]
        worst = 0.0
        for batch in BATCHES:
            together = tower.encode([prepared[i] for i in batch], tower.views)
            for view in tower.views:
                for i, row in zip(batch, together[view], strict=True):
                    expected = alone[i][view][0]
                    assert row.shape == expected.shape
                    worst = max(worst, float(np.abs(row - expected).max() / np.abs(expected).max()))
        return worst

    return measure


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """The hub's library with an empty cache and a hub that refuses connections, so that the network has no say.

    Returns the seconds that are waited, which fill up as it is asked again; nothing is waited.
    """
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    return waited
