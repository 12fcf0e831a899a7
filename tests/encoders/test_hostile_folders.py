"""Folders and files of encoders that want to run code, to read what lies elsewhere, or to take all time and memory."""

import json
import os
import pickle
import resource
import shutil
import struct
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cachefuse.encoders import open_encoder
from cachefuse.encoders.base import EncoderSpec
from cachefuse.encoders.model_files import find_weights, is_bare
from cachefuse.errors import CachefuseError, EncoderError
from cachefuse.nn.t5_weights import load_t5


class Marker:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def marker(tmp_path_factory):
    """The path of the marker, and the bytes of a pickle and of a torch.save that write it."""
    path = tmp_path_factory.mktemp("marker") / "written"
    plain = pickle.dumps({"weight": Marker(path)})
    saved = path.with_name("saved")
    torch.save({"weight": Marker(path)}, saved)
    pickle.loads(plain)
    assert path.exists()  # the test is able to fail
    path.unlink()
    yield path, plain, saved.read_bytes()
    assert not path.exists()


@pytest.fixture(scope="module")
def makers(makers, tmp_path_factory):
    """The makers of encoders, each of which builds its model once and then copies it."""
    made: dict[str, tuple[Path, str]] = {}

    def copy(family: str, folder: Path) -> str:
        if family not in made:
            torch.manual_seed(0)
            first = tmp_path_factory.mktemp(family)
            made[family] = first, makers[family](first)
        first, spec = made[family]
        shutil.copytree(first, folder, dirs_exist_ok=True)
        return spec.replace(str(first), str(folder))

    return {family: partial(copy, family) for family in makers}


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refusal(spec: str) -> str:
    """Return the message that refuses an encoder; it has one line."""
    with pytest.raises(CachefuseError) as refused:
        open_encoder(spec)
    assert "\n" not in str(refused.value)
    return str(refused.value)


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


def most_slow(*values: Any, fast: Collection[Any]) -> list[Any]:
    """Return parameters of which a few are tried by default."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


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


INDEX = "model.safetensors.index.json"


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


def test_a_dense_module_is_as_large_as_its_weights(makers, tmp_path, marker):
    spec = makers["hf-bert"](tmp_path)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling", "2_Dense"):
        (tmp_path / name).mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    dense = tmp_path / "2_Dense"
    (dense / "pytorch_model.bin").write_bytes(marker[2])
    (dense / "config.json").write_text(json.dumps({"in_features": 32, "out_features": 4}))
    assert "model.safetensors" in refusal(spec)
    save_file({"linear.weight": torch.ones(4, 32), "linear.bias": torch.ones(4)}, dense / "model.safetensors")
    open_encoder(spec)
    edit(dense / "config.json", out_features=10**12)
    refusal(spec)
    edit(dense / "config.json", out_features=4)
    (dense / "model.safetensors").rename(tmp_path.parent / "moved.safetensors")
    (dense / "model.safetensors").symlink_to(tmp_path.parent / "moved.safetensors")
    assert "link" in refusal(spec)


LARGE = [
    ("hf-bert", {"num_hidden_layers": 200_000}),
    ("hf-bert", {"num_hidden_layers": 10**12}),
    ("hf-bert", {"num_hidden_layers": 1_000}),
    ("hf-bert", {"num_hidden_layers": 0}),
    ("hf-bert", {"num_hidden_layers": -1}),
    ("hf-bert", {"num_hidden_layers": 1}),
    ("hf-bert", {"num_hidden_layers": 2.5}),
    ("hf-bert", {"num_hidden_layers": "200000"}),
    ("hf-bert", {"vocab_size": 10**12}),
    ("hf-bert", {"vocab_size": 10**7}),
    ("hf-bert", {"hidden_size": 10**6}),
    ("hf-bert", {"hidden_size": float("nan")}),
    ("hf-bert", {"intermediate_size": 10**9}),
    ("hf-bert", {"intermediate_size": 1e300}),
    ("hf-bert", {"max_position_embeddings": 10**7}),
    ("hf-bert", {"max_position_embeddings": 10**400}),
    ("hf-bert", {"num_labels": 10**9}),
    ("hf-bert", {"layer_norm_eps": float("nan")}),
    ("hf-t5", {"num_layers": 200_000}),
    ("hf-t5", {"num_decoder_layers": 200_000}),
    ("hf-t5", {"d_ff": 10**9}),
    ("hf-t5", {"relative_attention_num_buckets": 10**9}),
    ("hf-vit", {"image_size": 10**6}),
    ("hf-vit", {"patch_size": 10**9}),
    ("hf-vit", {"num_attention_heads": 10**9}),
    ("hf-resnet", {"depths": [200_000, 1]}),
    ("hf-resnet", {"depths": [1] * 2_000, "hidden_sizes": [8] * 2_000}),
    ("hf-resnet", {"hidden_sizes": [8, 10**6]}),
    ("clip", {"vision_cfg": {"image_size": 32, "layers": 200_000, "width": 64, "head_width": 16, "patch_size": 8}}),
    ("clip", {"vision_cfg": {"image_size": 32, "layers": 2, "width": 16_384, "head_width": 16, "patch_size": 8}}),
    ("clip", {"vision_cfg": {"image_size": 10**6, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}}),
    ("clip", {"vision_cfg": {"image_size": 4096, "layers": 2, "width": 64, "head_width": 16, "patch_size": 1}}),
    ("clip", {"vision_cfg": {"timm_model_name": "local-dir:/tmp/evil", "image_size": 32}}),
    ("clip", {"text_cfg": {"context_length": 16, "vocab_size": 10**12, "width": 32, "heads": 2, "layers": 2}}),
    ("clip", {"text_cfg": {"context_length": 10**6, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}),
    ("clip", {"text_cfg": {"hf_model_name": "/tmp/evil", "hf_tokenizer_name": "x"}}),
    ("clip", {"text_cfg": {"hf_model_name": "..", "hf_tokenizer_name": "x"}}),
    ("clip", {"embed_dim": 10**9}),
    ("timm-vit", {"depth": 200_000}),
    ("timm-vit", {"depth": 900}),
    ("timm-vit", {"embed_dim": 10**6}),
    ("timm-vit", {"mlp_ratio": 1e9}),
    ("timm-vit", {"img_size": 10**6}),
    ("timm-vit", {"checkpoint_path": "evil.bin"}),
    ("timm-vit", {"pretrained_cfg_overlay": {"file": "evil.bin"}}),
]


@pytest.mark.parametrize(
    ("family", "values"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (i % 3 > 0), id=f"{case[0]}-{str(case[1])[:40]}")
        for i, case in enumerate(LARGE)
    ],
)
def test_a_configuration_takes_no_more_than_its_weights(family, values, makers, tmp_path):
    spec = makers[family](tmp_path)
    if family == "clip":
        path = tmp_path / "open_clip_config.json"
        edit(path, model_cfg={**json.loads(path.read_text())["model_cfg"], **values})
    elif family == "timm-vit":
        data = {"input_size": [3, 160, 160], "interpolation": "bicubic", "crop_pct": 0.95, "mean": [0.5], "std": [0.5]}
        (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": data, "model_args": values}))
    else:
        edit(tmp_path / "config.json", **values)
    begun, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(spec)
    assert time.process_time() - begun < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000  # kB
    if family == "hf-t5":
        with pytest.raises(CachefuseError):
            load_t5(spec)


@pytest.mark.parametrize(
    "values",
    [
        {"size": {"height": 10**6, "width": 10**6}},
        {"size": {"shortest_edge": 1e9}},
        {"size": {"longest_edge": 10**6}},
        {"crop_size": 10**6},
        {"pad_size": {"height": 10**6, "width": 10**6}, "do_pad": True},
        {"size": {"shortest_edge": 224}, "crop_pct": 1e-6},
        {"image_mean": [float("nan")] * 3},
    ],
)
def test_images_are_not_prepared_for_millions_of_pixels(values, makers, tmp_path):
    spec = makers["hf-vit"](tmp_path)
    edit(tmp_path / "preprocessor_config.json", **values)
    begun = time.process_time()
    refusal(spec)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "null", *most_slow('{"a":' * 500 + "0" + "}" * 500, "", "[]", "\xff", '{"a": 1', fast=())],
    ids=["brackets", "null", "deep", "empty", "list", "latin", "cut"],
)
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("hf-bert", "config.json"),
        ("hf-bert", "tokenizer_config.json"),
        ("hf-bert", "modules.json"),
        ("hf-vit", "preprocessor_config.json"),
        ("clip", "open_clip_config.json"),
        ("timm-vit", "config.json"),
    ],
)
def test_json_of_another_content_is_refused_in_one_line(family, name, text, makers, tmp_path):
    spec = makers[family](tmp_path)
    (tmp_path / name).write_text(text, encoding="latin-1")
    if text in ("[]", "null") and name == "modules.json":
        refusal(spec)
        return
    assert name in refusal(spec)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "modules.json", INDEX])
def test_huge_files_are_not_read(name, makers, tmp_path):
    spec = makers["hf-bert"](tmp_path)
    with (tmp_path / name).open("ab") as file:
        file.truncate(1 << 30)
    begun = time.process_time()
    assert name in refusal(spec)
    assert time.process_time() - begun < 5


def header(path: Path, change: Callable[[dict], object]) -> None:
    """Write a changed header into a safetensors file."""
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    stated = json.loads(data[8 : 8 + n])
    change(stated)
    text = json.dumps(stated).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])


def _dtype(stated):
    stated["shared.weight"]["dtype"] = "F64"


def _shape(stated):
    stated["shared.weight"]["shape"] = stated["shared.weight"]["shape"][::-1]


def _overlap(stated):
    one, other = [name for name in stated if name != "__metadata__"][:2]
    stated[one]["data_offsets"] = stated[other]["data_offsets"]


def _beyond(stated):
    stated["shared.weight"]["data_offsets"] = [0, 10**15]


def _enormous(stated):
    stated["shared.weight"]["shape"] = [10**15, 10**15]


@pytest.mark.parametrize("change", [_dtype, _shape, _overlap, _beyond, _enormous])
def test_a_t5_s_header_that_lies_is_refused(change, makers, tmp_path):
    spec = makers["hf-t5"](tmp_path)
    header(tmp_path / "model.safetensors", change)
    refusal(spec)
    with pytest.raises(EncoderError):
        load_t5(spec)


@pytest.mark.parametrize("n_bytes", [4, 8, 100, -1])
def test_truncated_weights_are_refused(n_bytes, makers, tmp_path):
    spec = makers["hf-t5"](tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:n_bytes])
    refusal(spec)
    with pytest.raises(EncoderError):
        load_t5(spec)


def test_weights_that_do_not_fit_into_memory_are_not_loaded(makers, tmp_path):
    spec = makers["hf-bert"](tmp_path)
    text = json.dumps({"x": {"dtype": "U8", "shape": [1 << 42], "data_offsets": [0, 1 << 42]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + (1 << 42))
    assert "memory" in refusal(spec)


def test_a_flipped_bit_of_a_weight_is_another_key(makers, tmp_path):
    spec = makers["hf-bert"](tmp_path)
    before = open_encoder(spec)["text"].provenance
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    assert open_encoder(spec)["text"].provenance["weights"] != before["weights"]


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


def test_names_of_files_in_the_same_folder():
    assert is_bare("model-1.safetensors")
    assert not any(map(is_bare, ("", ".", "..", "a/b", "a\\b", "c:a", "a\0b", "/a")))
