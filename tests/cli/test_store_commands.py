"""`cachefuse plan`, `inspect` and `verify`, as they are typed."""

import json
import re

import pytest

from fixtures.messages import says

EXTRACT = ("extract", "--dataset", "./mine.toml", "--encoder", "classic")
SHARD = "workspace/cache/mine.zarr/features/classic/image/pooled/c/1/0"


def spoil(folder):
    data = bytearray((folder / SHARD).read_bytes())
    data[77] ^= 1
    (folder / SHARD).write_bytes(data)


def test_a_plan_in_a_table_and_as_json(cachefuse, folder, fits):
    result = cachefuse("plan", "--dataset", "./mine.toml", "--encoder", "classic")
    assert result.code == 0
    assert "the disk has enough space" in result.out
    assert "next  cachefuse extract, with the same options" in result.out
    fits(result.out)
    assert not (folder / "workspace").exists()
    plan = json.loads(cachefuse("plan", "--dataset", "./mine.toml", "--encoder", "classic", "--json").out)
    assert plan["fits"]
    assert plan["n_bytes"] == sum(view["n_bytes"] for view in plan["views"]) > 0
    assert [view["pending"] for view in plan["views"]] == [160, 160, 160]
    cachefuse(*EXTRACT)
    again = cachefuse("plan", "--dataset", "./mine.toml", "--encoder", "classic")
    assert "Nothing to compute: all features are already there." in again.out


def test_inspect_shows_arrays_progress_and_provenance(cachefuse, workspace, fits):
    result = cachefuse("inspect")
    assert result.code == 0
    assert "dataset mine: 160 samples (train 87, val 33, test 40)" in result.out
    assert re.search(r"classic +image +pooled +160 x 724 +float16 +279 kB +all", result.out)
    assert "classic (image) was made with" in result.out
    fits(result.out, keep=("architecture",))
    found = json.loads(cachefuse("inspect", "--json").out)
    assert [(view["modality"], view["done"], view["rows"]) for view in found["views"]] == [
        ("image", 160, 160), ("text", 160, 160), ("text", 160, 160),
    ]  # fmt: skip
    assert found["encoders"][0]["provenance"]["family"] == "classic"
    assert found["present"] == {"image": 160, "text": 160}


def test_inspect_lists_what_is_bad(cachefuse, folder):
    cachefuse(*EXTRACT)
    assert cachefuse("inspect", "--bad").out == "mine has no bad samples so far.\n"
    rows = [f"{i},{'' if i == 7 else 'a text'},x" for i in range(30)]
    (folder / "few.csv").write_text("\n".join(["id,text,label", *rows]))
    (folder / "few.toml").write_text(
        'name = "few"\ntask = "multiclass"\n[reader]\nkind = "table"\nfiles = { train = "few.csv" }\n'
        'id = "id"\ntext = "text"\nlabels = "label"\n'
    )
    assert cachefuse("extract", "--dataset", "./few.toml", "--encoder", "classic").code == 0
    assert "1 bad sample; cachefuse inspect --bad lists them" in cachefuse("inspect").out
    listed = cachefuse("inspect", "--bad").out.splitlines()
    assert listed[0].split() == ["sample", "modality", "reason", "file"]
    assert listed[1].split()[:2] == ["7", "text"]
    assert "has no text" in listed[1]


def test_verify_names_damage_and_repairs_it(cachefuse, workspace, folder, fits):
    sound = cachefuse("verify")
    assert sound.code == 0
    assert says(sound.out, "holds all undamaged")
    fits(sound.out)
    spoil(folder)
    spoiled = cachefuse("verify")
    assert spoiled.code == 1
    assert "damaged classic (image, pooled) block 1: its checksum does not fit" in spoiled.out
    found = json.loads(cachefuse("verify", "--json").out)
    assert not found["sound"]
    assert [(damage["view"], damage["block"]) for damage in found["damage"]] == [("pooled", 1)]
    assert says(cachefuse("train-head", "--epochs", "1").error, "block 1 damaged")
    repaired = cachefuse("verify", "--repair")
    assert repaired.code == 0
    assert says(repaired.err, "damaged classic image pooled block 1")
    assert cachefuse("train-head", "--epochs", "1").code == 0


def test_repair_of_a_trial_store_without_its_raw_data_says_where_to_put_it(cachefuse, folder):
    (folder / "few.csv").write_text("id,text,label\n" + "\n".join(f"{i},text {i},x" for i in range(300)))
    (folder / "few.toml").write_text(
        'name = "few"\ntask = "multiclass"\n[reader]\nkind = "table"\nfiles = { train = "few.csv" }\n'
        'id = "id"\ntext = "text"\nlabels = "label"\n'
    )
    assert cachefuse("extract", "--dataset", "./few.toml", "--encoder", "classic", "--limit", "100").code == 0
    shard = folder / "workspace/cache/few-limit100.zarr/features/classic/text/pooled/c/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert says(cachefuse("verify", "--repair").error, "few.csv")
    assert cachefuse("verify", "--repair", "--data-dir", ".").code == 0


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_without_a_store_it_is_one_line(cachefuse, command):
    result = cachefuse(command)
    assert result.code == 1
    assert says(result.error, "workspace extract --dataset NAME")


def test_refresh_computes_changed_samples_again(cachefuse, folder):
    rows = [f"{i},text {i},{'xy'[i % 2]}" for i in range(100)]
    (folder / "few.toml").write_text(
        'name = "few"\ntask = "multiclass"\n[reader]\nkind = "table"\nfiles = { train = "few.csv" }\n'
        'id = "id"\ntext = "text"\nlabels = "label"\n'
    )
    extract = ("extract", "--dataset", "./few.toml", "--encoder", "classic")
    (folder / "few.csv").write_text("\n".join(["id,text,label", *rows]))
    assert cachefuse(*extract).code == 0
    rows[5] = "5,another text,y"
    (folder / "few.csv").write_text("\n".join(["id,text,label", *rows]))
    refused = cachefuse(*extract)
    assert refused.code == 1
    assert says(refused.error, "1")
    assert says(refused.error, "5 --refresh")
    refreshed = json.loads(cachefuse(*extract, "--refresh", "--json").out)
    assert refreshed["features"][0]["computed"] == 1
