"""Encoders' folders that want to take all time and memory, and weights and configurations that lie or are damaged."""

import json
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cachefuse.encoders import open_encoder
from cachefuse.errors import CachefuseError, EncoderError
from cachefuse.nn.t5_weights import load_t5
from fixtures.hostile_folders import INDEX, edit, most_slow, refusal

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
    restore(dense, lambda tensors: tensors.update({"linear.bias": torch.ones(4, dtype=torch.int8)}))
    assert "linear.bias" in refusal(spec)
    restore(dense, lambda tensors: tensors.update({"linear.bias": torch.ones(4)}))
    edit(dense / "config.json", out_features=10**12)
    refusal(spec)
    edit(dense / "config.json", out_features=4)
    (dense / "model.safetensors").rename(tmp_path.parent / "moved.safetensors")
    (dense / "model.safetensors").symlink_to(tmp_path.parent / "moved.safetensors")
    assert "link" in refusal(spec)


def header(path: Path, change: Callable[[dict], object]) -> None:
    """Write a changed header into a safetensors file."""
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    stated = json.loads(data[8 : 8 + n])
    change(stated)
    text = json.dumps(stated).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])


def restore(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the tensors of a folder's weights."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("hf-bert", "encoder.layer.1.output.dense.weight"),
        ("hf-t5", "encoder.block.0.layer.0.SelfAttention.q.weight"),
        ("hf-resnet", "embedder.embedder.convolution.weight"),
        ("clip", "visual.class_embedding"),
        ("timm-vit", "pos_embed"),
    ],
)
def test_integers_are_no_weights(family, name, makers, tmp_path):
    spec = makers[family](tmp_path)
    restore(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert f"{name} is stored as integers (I8)" in refusal(spec)
    if family == "hf-t5":
        with pytest.raises(EncoderError, match=f"{name} is stored as integers .I8"):
            load_t5(spec)


def test_integers_under_the_names_of_a_larger_model_are_no_weights(makers, tmp_path):
    spec, name = makers["hf-bert"](tmp_path), "bert.encoder.layer.0.output.dense.bias"

    def change(tensors):
        own = dict(tensors)
        tensors.clear()
        tensors.update({f"bert.{name}": tensor for name, tensor in own.items()})
        tensors[name] = tensors[name].to(torch.int32)

    restore(tmp_path, change)
    assert f"{name} is stored as integers (I32)" in refusal(spec)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_floats_of_another_width_are_weights_and_a_buffer_may_be_of_integers(dtype, makers, tmp_path):
    spec, name = makers["hf-bert"](tmp_path), "encoder.layer.1.output.dense.weight"

    def change(tensors):
        tensors[name] = tensors[name].to(dtype)
        tensors["embeddings.position_ids"] = torch.arange(40)[None]
        tensors["encoder.layer.0.attention.mask"] = torch.ones(4, 4, dtype=torch.bool)

    restore(tmp_path, change)
    assert open_encoder(spec)["text"].width == 32


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
