import pytest

from cachefuse.encoders import DEFAULT_ENCODER, FAMILIES, open_encoder
from cachefuse.encoders.base import EncoderSpec
from cachefuse.errors import EncoderError, UnknownNameError
from fixtures.messages import naming


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("classic", ("classic", "", "")),
        ("clip:ViT-B-32@laion2b_s34b_b79k", ("clip", "ViT-B-32", "laion2b_s34b_b79k")),
        ("hf:org/name@v1.0", ("hf", "org/name", "v1.0")),
        ("timm:resnet18@./w.safetensors", ("timm", "resnet18", "./w.safetensors")),
        (" hf:bert-base-uncased ", ("hf", "bert-base-uncased", "")),
    ],
)
def test_parse_splits_family_model_and_weights(text, expected):
    spec = EncoderSpec.parse(text)
    assert (spec.family, spec.model, spec.weights) == expected
    assert str(spec) == text.strip()


def test_at_sign_in_a_folder_that_exists_belongs_to_the_folder(tmp_path):
    folder = tmp_path / "me@home"
    folder.mkdir()
    assert EncoderSpec.parse(f"hf:{folder}") == EncoderSpec("hf", str(folder))


def test_short_is_the_same_wherever_the_files_lie(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    shorts = {EncoderSpec.parse(text).short for text in ("hf:model", "hf:./model", f"hf:{tmp_path}/model")}
    assert shorts == {"hf:model"}


def test_absolute_opens_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = EncoderSpec.parse("timm:resnet18@./w.safetensors").absolute()
    assert spec == EncoderSpec("timm", "resnet18", str(tmp_path / "w.safetensors"))


def test_the_default_and_the_examples_name_known_families():
    assert EncoderSpec.parse(DEFAULT_ENCODER).family in FAMILIES
    assert [EncoderSpec.parse(family.example).family for family in FAMILIES.values()] == list(FAMILIES)


def test_options_follow_the_weights_in_any_order_and_without_defaults():
    spec = EncoderSpec.parse("hf:org/name@main,max-tokens=64,long_texts=cut,pooling=cls")
    assert (spec.model, spec.weights) == ("org/name", "main")
    assert (spec.option("pooling"), spec.option("max_tokens"), spec.option("long_texts")) == ("cls", "64", None)
    assert str(spec) == "hf:org/name@main,max_tokens=64,pooling=cls"
    assert EncoderSpec.parse(str(spec)) == spec


def test_options_are_part_of_the_name_of_the_features(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    spec = EncoderSpec.parse("hf:./model,pooling=cls")
    assert (spec.short, str(spec.absolute())) == ("hf:model,pooling=cls", f"hf:{tmp_path}/model,pooling=cls")


def test_what_looks_like_an_option_in_a_folder_that_exists_belongs_to_the_folder(tmp_path):
    folder = tmp_path / "model,pooling=cls"
    folder.mkdir()
    assert EncoderSpec.parse(f"hf:{folder}") == EncoderSpec("hf", str(folder))
    assert EncoderSpec.parse(f"hf:{folder},pooling=mean") == EncoderSpec("hf", str(folder), "", (("pooling", "mean"),))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("classic,pooling=cls", "classic pooling"),
        ("hf:x,poling=cls", "poling pooling"),
        ("hf:x,pooling=middle", "middle cls mean"),
        ("hf:x,max_tokens=0", "max_tokens 1"),
        ("hf:x,max_tokens=many", "max_tokens many"),
        ("hf:x,pooling=cls,pooling=mean", "pooling twice"),
    ],
)
def test_options_that_an_encoder_does_not_have_are_refused_before_it_is_opened(spec, words):
    with pytest.raises(EncoderError, match=naming(words)):
        open_encoder(spec)


def test_unknown_family_suggests():
    with pytest.raises(UnknownNameError, match=naming("clap clip")):
        open_encoder("clap:ViT-B-32")


def test_a_spec_needs_a_family():
    with pytest.raises(EncoderError, match="family:model"):
        open_encoder(":ViT-B-32")


def test_a_home_folder_is_found_where_the_shell_does_not_expand_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    spec = EncoderSpec.parse("hf:~/model")
    assert (str(spec.absolute()), spec.short) == (f"hf:{tmp_path}/model", "hf:model")
    assert str(EncoderSpec.parse("clip:B@~/w.safetensors").absolute()) == f"clip:B@{tmp_path}/w.safetensors"


def test_a_tag_is_a_tag_whatever_lies_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").mkdir()
    assert str(EncoderSpec.parse("clip:ViT-B-32@openai").absolute()) == "clip:ViT-B-32@openai"
