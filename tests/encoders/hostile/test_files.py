"""Encoders' folders whose files are pickles, or lead elsewhere: what is opened is a regular file of the folder."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cachefuse.encoders import open_encoder
from cachefuse.encoders.base import EncoderSpec
from cachefuse.encoders.model_files import find_weights, is_bare
from cachefuse.errors import EncoderError
from cachefuse.nn.t5_weights import load_t5
from fixtures.hostile_folders import INDEX, edit, most_slow, refusal

PICKLES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.bin",
    "adapter_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "vocab.pkl",
    "weights.npz",
    "weights.bin",
    "model.ckpt",
    "tf_model.h5",
    "flax_model.msgpack",
    "modeling_evil.py",
    "1_Dense/pytorch_model.bin",
)
FAMILIES = ("clip", "clip-custom-text", "hf-bert", "hf-t5", "hf-vit", "timm-vit", "timm-cnn")


@pytest.mark.parametrize("family", most_slow(*FAMILIES, fast=("hf-bert", "clip")))
def test_pickles_beside_the_weights_are_never_opened(family, makers, tmp_path, marker):
    spec = makers[family](tmp_path)
    before = {modality: tower.provenance for modality, tower in open_encoder(spec).items()}
    (tmp_path / "1_Dense").mkdir()
    _, plain, saved = marker
    for name in PICKLES:
        (tmp_path / name).write_bytes(saved if name.endswith((".bin", ".pt", ".pth")) else plain)
    assert {modality: tower.provenance for modality, tower in open_encoder(spec).items()} == before


@pytest.mark.parametrize("kind", [1, 2], ids=["pickle", "zip"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_a_pickle_are_refused(family, kind, makers, tmp_path, marker):
    spec = makers[family](tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    weights.write_bytes(marker[kind])
    assert "safetensors" in refusal(spec)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "model.pt",
        "../other/model.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "x.safetensors/../pytorch_model.bin",
        "pytorch_model.bin\0.safetensors",
        "{folder}/pytorch_model.bin",
        "{other}/model.safetensors",
        "missing.safetensors",
        "link.safetensors",
        "pipe.safetensors",
        "zero.safetensors",
        "folder.safetensors",
        "pickle.safetensors",
        None,
        3,
        ["shard.safetensors"],
    ],
)
@pytest.mark.parametrize("family", most_slow("hf-bert", "hf-t5", fast=["hf-t5"]))
def test_an_index_names_safetensors_files_of_its_folder_and_nothing_else(family, name, makers, tmp_path, marker):
    folder, other = tmp_path / "model", tmp_path / "other"
    for path in (folder / "sub", other, folder / "folder.safetensors"):
        path.mkdir(parents=True)
    spec = makers[family](folder)
    weights = folder / "model.safetensors"
    keys = list(load_file(weights))
    for target in (other / "model.safetensors", folder / "sub" / "model.safetensors", folder / "shard.safetensors"):
        target.write_bytes(weights.read_bytes())
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(marker[2])
    (folder / "model.pt").write_bytes(marker[2])
    (folder / "pickle.safetensors").write_bytes(marker[2])
    (folder / "link.safetensors").symlink_to(other / "model.safetensors")
    (folder / "zero.safetensors").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.safetensors")
    good = {"metadata": {}, "weight_map": dict.fromkeys(keys, "shard.safetensors")}
    (folder / INDEX).write_text(json.dumps(good))
    if name is None:
        open_encoder(spec)
    named = name.format(folder=folder, other=other) if isinstance(name, str) else name
    for map_of in (dict.fromkeys(keys, named), {**good["weight_map"], keys[-1]: named}):
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": map_of}))
        refusal(spec)
        if family == "hf-t5":
            with pytest.raises(EncoderError):
                load_t5(spec)


def test_a_snapshot_of_the_hub_s_cache_has_links_to_its_own_blobs(makers, tmp_path):
    repository = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    spec = makers["hf-bert"](snapshot)
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(Path("..", "..", "blobs", str(i)))
    open_encoder(spec)
    weights = (snapshot / "model.safetensors").resolve()
    (snapshot / "model.safetensors").unlink()
    elsewhere = weights.rename(tmp_path / "elsewhere")
    (snapshot / "model.safetensors").symlink_to(elsewhere)
    assert "model.safetensors" in refusal(spec)


FILES = {
    "clip": ("open_clip_config.json", "open_clip_model.safetensors"),
    "hf-bert": ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    "hf-vit": ("config.json", "model.safetensors", "preprocessor_config.json"),
    "timm-vit": ("weights.safetensors",),
}


@pytest.mark.parametrize("kind", ["link", "pipe", "zero", "folder"])
@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in FILES.items() for name in names])
def test_each_file_is_a_regular_one_of_the_folder(family, name, kind, makers, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    spec = makers[family](folder)
    (folder / name).rename(tmp_path / "elsewhere")
    match kind:
        case "link":
            (folder / name).symlink_to(tmp_path / "elsewhere")
        case "pipe":
            os.mkfifo(folder / name)
        case "zero":
            (folder / name).symlink_to("/dev/zero")
        case "folder":
            (folder / name).mkdir()
    if (family, kind) == ("timm-vit", "link"):  # a file that the user names, not a folder
        open_encoder(spec)
    else:
        refusal(spec)


NAMES = [
    ("config.json", {"transformers_weights": "other.safetensors"}),
    ("config.json", {"transformers_weights": "../other/model.safetensors"}),
    ("config.json", {"transformers_weights": "adapter_model.bin"}),
    ("config.json", {"use_pretrained_backbone": True, "backbone": "resnet18"}),
    ("config.json", {"backbone": "local-dir:/tmp/evil"}),
    ("config.json", {"backbone": "org/name"}),
    ("config.json", {"_attn_implementation": "org/kernel"}),
    ("config.json", {"attn_implementation": "org/kernel"}),
    ("config.json", {"text_config": {"weights": "/tmp/evil.bin"}}),
    ("config.json", {"anything": ["~/evil"]}),
    ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}),
    ("tokenizer_config.json", {"vocab_file": "../vocab.txt"}),
    ("tokenizer_config.json", {"merges_file": "../merges.txt"}),
    ("tokenizer_config.json", {"sp_model_kwargs": {"model_file": "/tmp/evil.model"}}),
    ("tokenizer_config.json", {"init_inputs": ["/etc/passwd"]}),
    ("tokenizer_config.json", {"extra_ids": 10**12}),
    ("adapter_config.json", {"base_model_name_or_path": "../other", "peft_type": "LORA"}),
]


@pytest.mark.parametrize(("name", "values"), NAMES, ids=[f"{name}-{next(iter(values))}" for name, values in NAMES])
def test_a_key_that_names_another_file_is_refused_by_its_name(name, values, makers, tmp_path):
    spec = makers["hf-bert"](tmp_path)
    if not (tmp_path / name).exists():
        (tmp_path / name).write_text("{}")
    edit(tmp_path / name, **values)
    key = next(iter(values))
    inner = values[key] if isinstance(values[key], dict) else {key: 0}
    assert name in refusal(spec)
    assert name == "adapter_config.json" or next(iter(inner)) in refusal(spec)


def test_what_is_not_read_may_name_anything(makers, tmp_path):
    """Where a model came from, and code that never runs, are in many published folders."""
    spec = makers["hf-bert"](tmp_path)
    before = open_encoder(spec)["text"].provenance
    evil = {"AutoConfig": "evil.Config", "AutoModel": "org/name--modeling_evil.Model"}
    edit(tmp_path / "config.json", _name_or_path="/home/someone/model", id2label={"0": "/", "1": "../x.bin"})
    edit(
        tmp_path / "tokenizer_config.json",
        name_or_path="../old",
        special_tokens_map_file="/root/.cache/special_tokens_map.json",
        tokenizer_file="/root/.cache/huggingface/0123.json",
        auto_map={"AutoTokenizer": [None, "org/name--evil.Tokenizer"]},
        chat_template="/{{ x }}/..",
    )
    assert open_encoder(spec)["text"].provenance == before
    edit(tmp_path / "config.json", auto_map=evil)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('ran')")
    open_encoder(spec)


@pytest.mark.parametrize("path", ["../other", "{other}", "/", "link", "..", "0/../../other"])
def test_modules_are_folders_of_the_folder(path, makers, tmp_path):
    folder, other = tmp_path / "model", tmp_path / "other"
    for one in (folder / "0", other):
        one.mkdir(parents=True)
    spec = makers["hf-bert"](folder)
    makers["hf-bert"](other)
    (other / "pooling_mode_mean_tokens").touch()
    (folder / "link").symlink_to(other)
    where = path.format(other=other)
    kind = "sentence_transformers.models."
    for places in ((where, "1_Pooling"), ("", where)):
        modules = [{"type": kind + name, "path": p} for name, p in zip(("Transformer", "Pooling"), places, strict=True)]
        (folder / "modules.json").write_text(json.dumps(modules))
        assert "modules.json" in refusal(spec)


def test_a_repository_with_an_index_of_several_files_opens(makers, tmp_path):
    spec = makers["hf-bert"](tmp_path)
    before = open_encoder(spec)["text"].provenance
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(weights)}
    for file in set(names.values()):
        save_file({key: weights[key] for key in names if names[key] == file}, tmp_path / file, {"format": "pt"})
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (tmp_path / "left-over.safetensors").write_bytes(b"not read")
    assert open_encoder(spec)["text"].provenance == before
    assert len(find_weights(EncoderSpec.parse(spec), tmp_path).files) == 2


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("config.json", {"num_attention_heads": 0}, "ZeroDivisionError"),
        ("config.json", {"hidden_act": "no such one"}, "KeyError"),
        ("tokenizer_config.json", {"model_max_length": "many"}, "TypeError"),
    ],
)
def test_a_value_that_a_library_cannot_use_is_said_to_be_one(name, values, kind, makers, tmp_path):
    spec = makers["hf-bert"](tmp_path)
    edit(tmp_path / name, **values)
    assert f"a value in its configuration files does not fit the library ({kind}: " in refusal(spec)


def test_names_of_files_in_the_same_folder():
    assert is_bare("model-1.safetensors")
    assert not any(map(is_bare, ("", ".", "..", "a/b", "a\\b", "c:a", "a\0b", "/a")))
