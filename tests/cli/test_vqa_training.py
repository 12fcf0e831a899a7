"""Heads that answer questions about images, and decoders that write the answers, from the raw files to a submission."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel

from cachefuse import open_features
from cachefuse.data.answers import vqa_accuracy
from cachefuse.errors import ConfigError
from cachefuse.experiments.costs import measure_costs
from cachefuse.nn.answer_decoder import AnswerWriter
from cachefuse.runs.save import load_run
from cachefuse.store.format import seal
from cachefuse.store.store import FeatureStore
from cachefuse.store.views import declare_group
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import open_training_data
from cachefuse.training.resolved import resolve
from cachefuse.training.split import make_splits
from fixtures.messages import naming, says
from fixtures.runs import edit, reseal

DOCUMENT = (Path(__file__).parents[2] / "cachefuse" / "data" / "README.md").read_text(encoding="utf-8")
SPLITS = {"train2014": range(1, 41), "val2014": range(41, 61), "test2015": range(61, 66)}
WORDS = ("what", "colour", "is", "it", "?", "red", "green", "how", "many", "yes", "no", "dark", "two")
WRITES = ("--fusion", "midfusion", "--fusion-options", "answers=text", "--fusion-options", "decoder_layers=2")


def ask(image):
    """Which answer is right depends on the image, on the question, or on both; some people err, or say another word."""
    colour = ["red", "green"][image % 2]
    return [
        ("What colour is it?", [colour] * 7 + [f"Dark {colour}"] * 2 + ["a bottle"]),
        ("Is it red?", [["yes", "no"][image % 2]] * 9 + ["maybe"]),
        ("How many?", ["two"] * 9 + ["three"]),
    ]


@pytest.fixture(scope="module")
def raw(write_vqa, tmp_path_factory):
    return write_vqa(tmp_path_factory.mktemp("raw"), SPLITS, ask)


@pytest.fixture
def data(raw, folder):
    return shutil.copytree(raw, folder / "data")


@pytest.fixture(scope="module")
def features(raw, run_in, tmp_path_factory):
    """A workspace with their features, made once."""
    folder = tmp_path_factory.mktemp("features")
    run_in(folder, "extract", "--dataset", "vqa2", "--data-dir", raw, "--encoder", "classic", "--json")
    return folder / "workspace"


@pytest.fixture
def extracted(features, data, folder):
    shutil.copytree(features, folder / "workspace")
    return data


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a small ViT and a small T5, named as the README names larger models."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    vit = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    transformers.ViTModel(vit, add_pooling_layer=False).save_pretrained(folder / "vit_s14")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit_s14")
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(
        folder / "all-MiniLM-L6-v2"
    )
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}
    t5 = transformers.T5Config(vocab_size=len(vocabulary), decoder_start_token_id=0, **shape)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(folder / "all-MiniLM-L6-v2")
    return folder


@pytest.fixture(scope="module")
def token_features(raw, models, run_in):
    """A workspace with the tokens of the ViT, and the ids of the T5, made once."""
    for encoder, views in (("vit_s14", "pooled,tokens"), ("all-MiniLM-L6-v2", "pooled,tokens,ids")):
        about = "--encoder", f"hf:./{encoder}", "--views", views
        run_in(models, "extract", "--dataset", "vqa2", "--data-dir", raw, *about, "--json")
    return models / "workspace"


@pytest.fixture
def tokens(models, token_features, data, folder):
    """The same with the models beside it; the T5's folder is returned."""
    shutil.copytree(models, folder, dirs_exist_ok=True)
    return folder / "all-MiniLM-L6-v2"


def annotated(data, split):
    """Return what people answered, as texts, by question."""
    content = json.loads((data / f"v2_mscoco_{split}_annotations.json").read_text())
    return {one["question_id"]: [x["answer"] for x in one["answers"]] for one in content["annotations"]}


def predicted(cachefuse, folder, split):
    assert cachefuse("predict", "--split", split, "--output", "answers.json").code == 0
    return {row["question_id"]: row["answer"] for row in json.loads((folder / "answers.json").read_text())}


def test_from_questions_to_a_submission(cachefuse, extracted, folder, fits):
    result = cachefuse("train-head", "--epochs", "60", "--fusion", "concat")
    assert result.code == 0
    fits(result.out)
    assert "split  rows  VQA accuracy" in result.out
    evaluated = cachefuse("evaluate")
    fits(evaluated.out)
    assert "VQA accuracy" in evaluated.out
    (run,) = json.loads(cachefuse("runs", "--json").out)
    figure = run["metrics"]["vqa_accuracy"]
    found, people = predicted(cachefuse, folder, "val"), annotated(extracted, "val2014")
    assert found.keys() == people.keys()
    # The figure is that of the texts that are written, judged by what is in the file.
    assert vqa_accuracy(list(found.values()), list(people.values())).mean() == pytest.approx(figure)
    assert figure > 0.9
    assert cachefuse("predict").code == 0
    with (folder / "submission.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["question_id"] for row in rows] == [
        str(1000 * image + k) for image in SPLITS["test2015"] for k in range(3)
    ]
    assert {row["answer"] for row in rows} >= {"red", "green", "2"}
    image = extracted / "test2015/COCO_test2015_000000000061.jpg"
    one = cachefuse("predict", "--image", image, "--text", "How many?")
    assert one.out.splitlines()[1].split()[::2] == ["2", "yes"]


def test_figures_by_type_of_answer_and_question(cachefuse, extracted, folder):
    cachefuse("train-head", "--epochs", "20")
    found = json.loads(cachefuse("evaluate", "--no-intervals", "--json").out)
    people = annotated(extracted, "val2014")
    texts = predicted(cachefuse, folder, "val")
    right = dict(zip(texts, vqa_accuracy(list(texts.values()), [people[q] for q in texts]).tolist(), strict=True))
    yes_no = [right[q] for q in texts if {*people[q]} & {"yes", "no"}]
    assert found["kinds"]["answer_type"]["yes/no"] == [20, pytest.approx(np.mean(yes_no))]
    assert found["kinds"]["answer_type"]["other"][0] == 40
    assert found["kinds"]["question_type"].keys() == {"what colour", "is it", "how many?"}
    shown = cachefuse("evaluate", "--drop-modality", "image").out
    assert "answer type" in shown
    assert "yes/no" in shown


def test_an_older_store_and_an_older_run_have_no_figure_of_the_evaluation(cachefuse, extracted, folder):
    cachefuse("train-head", "--epochs", "2")
    store = folder / "workspace/cache/vqa2.zarr"
    about = json.loads((store / "zarr.json").read_text())["attributes"]["cachefuse"]
    declare_group(store, {"cachefuse": seal({k: x for k, x in about.items() if k not in ("answers", "checksum")})})
    for command in ("evaluate", "train-head"):
        refused = cachefuse(command)
        assert refused.code == 1
        assert says(refused.error, "cachefuse extract --dataset vqa2")
    assert cachefuse("predict").code == 0
    cachefuse("extract", "--dataset", "vqa2", "--data-dir", extracted, "--encoder", "classic")
    assert cachefuse("evaluate").code == 0
    (path,) = folder.glob("workspace/runs/*/run.json")
    edit(path, lambda values: values.pop("answers"))
    (run,) = json.loads(cachefuse("runs", "--json").out)
    assert run["metrics"]["vqa_accuracy"] is None
    assert cachefuse("evaluate").code == 0


def test_the_report_says_how_right_the_answers_are(cachefuse, extracted, folder):
    cachefuse("train-head", "--epochs", "2")
    assert cachefuse("report", "--data-dir", extracted).code == 0
    (path,) = folder.glob("workspace/runs/*/report.html")
    page = path.read_text()
    assert "VQA accuracy is" in page
    assert "an answer that four people gave is fully right" in page
    assert "answer type" in page
    assert "yes/no" in page
    (card,) = folder.glob("workspace/runs/*/README.md")
    assert "tags: [visual-question-answering, image, text, feature-cache]" in card.read_text()


def test_folds_never_part_questions_about_one_image(cachefuse, extracted, folder, monkeypatch):
    monkeypatch.setattr("cachefuse.training.split.STOP_PARTS", 1000)  # more than there are images
    store = FeatureStore(folder / "workspace/cache/vqa2.zarr")
    training = open_training_data(store)
    parts = make_splits(training, TrainConfig(folds=4, patience=2))
    images = store.feature_rows("image")
    held_out = torch.cat([part.held_out for part in parts])
    assert torch.equal(held_out.sort().values, training.rows("train", "val"))
    for part in parts:
        assert not {*images[part.held_out]} & {*images[part.train]}
        assert not {*images[part.validate]} & {*images[part.train]}
        assert 30 <= len(part.held_out) <= 60
    result = cachefuse("train-head", "--folds", "3", "--epochs", "5", "--json")
    assert json.loads(result.out)["metrics"]["oof"]["vqa_accuracy"] > 0.5


@pytest.mark.parametrize("loss", ["asl", "ce", "focal"])
@pytest.mark.one_in(3)
def test_other_losses_and_weights(cachefuse, extracted, loss):
    result = cachefuse("train-head", "--epochs", "20", "--loss", loss, "--class-weights", "balanced", "--json")
    assert json.loads(result.out)["metrics"]["val"]["vqa_accuracy"] > 0.6


def test_a_sweep_goes_by_vqa_accuracy(cachefuse, extracted, folder):
    (folder / "settings.toml").write_text('[[setting]]\nhead = "linear"\n[[setting]]\nloss = "ce"\n')
    swept = cachefuse("sweep", "--settings", "settings.toml", "--epochs", "3", "--seeds", "2")
    assert swept.code == 0, swept.err
    assert "VQA accuracy" in swept.out


@pytest.mark.slow
def test_the_documents_commands(cachefuse, models, data, folder):
    (block,) = re.findall(r"```\n(cachefuse extract --dataset vqa2.*?)```", DOCUMENT, flags=re.S)
    data.rename(folder / "vqa2")
    for name in ("vit_s14", "all-MiniLM-L6-v2"):
        shutil.copytree(models / name, folder / name)
    for line in block.splitlines():
        done = cachefuse(*shlex.split(line)[1:])
        assert done.code == 0, done.err
    written = json.loads((folder / "answers.json").read_text())
    assert [row.keys() for row in written] == [{"question_id", "answer"}] * 15


class TestWritten:
    @pytest.mark.slow
    def test_words(self, cachefuse, tokens, folder, data):
        result = cachefuse("train-head", *WRITES, "--fusion-options", "width=32", "--fusion-options", "text_view=ids",
                           "--epochs", "25", "--lr", "0.003", "--json")  # fmt: skip
        assert result.code == 0, result.err
        figure = json.loads(result.out)["metrics"]["val"]["vqa_accuracy"]
        assert figure > 0.9
        (path,) = folder.glob("workspace/runs/vqa2-midfusion-decoder-ce-1")
        run = load_run(path)
        assert run.members[0].model.fusion.head is None
        assert run.config.fusion_options["answer_tokens"][run.classes.index("dark red")] == [
            run.config.fusion_options["answer_tokens"][run.classes.index("dark green")][0],
            run.config.fusion_options["answer_tokens"][run.classes.index("red")][0],
            1,
        ]
        found, people = predicted(cachefuse, folder, "val"), annotated(data, "val2014")
        assert vqa_accuracy(list(found.values()), list(people.values())).mean() == pytest.approx(figure)
        card = (path / "README.md").read_text()
        assert "features with a decoder" in card
        assert "answer" not in card.split("## Settings")[1].replace("answers=text", "")
        evaluated = cachefuse("evaluate", "--drop-modality", "image", "--json")
        assert json.loads(evaluated.out)["metrics"]["vqa_accuracy"] < figure

    @pytest.mark.slow
    def test_a_pretrained_t5_writes_in_its_tokens(self, cachefuse, tokens, folder):
        result = cachefuse("train-head", *WRITES, "--fusion-options", f"t5=hf:{tokens}", "--epochs", "2", "--json")
        assert result.code == 0, result.err
        run = load_run(folder / "workspace/runs/vqa2-midfusion-decoder-ce-1")
        number = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
        written = dict(zip(run.classes, run.config.fusion_options["answer_tokens"], strict=True))
        assert written["dark red"] == [number["dark"], number["red"], number["</s>"]]
        assert written["bottle"] == written["maybe"] == [number["<unk>"], number["</s>"]]
        assert run.members[0].model.fusion.decoder.settings.num_decoder_layers == 2
        (tokens / "tokenizer.json").unlink()  # a run needs none of it
        assert cachefuse("predict").code == 0

    @pytest.mark.slow
    def test_where_to_fuse_takes_the_layers_that_the_t5_has(self, cachefuse, tokens, folder):
        """The thesis has 12 of each; this one has an encoder of 2 and a decoder of 3. It writes the answers."""
        options = [f"t5=hf:{tokens}", "pool=image=mean:1"]
        given = [word for option in options for word in ("--fusion-options", option)]
        result = cachefuse("sweep", "--preset", "where-to-fuse", *given, "--epochs", "1", "--seeds", "1", "--json")
        assert result.code == 0, result.err
        lines = (folder / "workspace/sweeps/vqa2-where-to-fuse/trials.jsonl").read_text().splitlines()
        trials = [json.loads(line)["settings"] for line in lines]
        assert {(t["fusion_options"]["fusion_spec"], t["fusion_options"]["decoder_layers"]) for t in trials} == {
            (f"0:text,{layer}:image", n) for layer in (0, 1, 2) for n in (1, 2, 3)
        }
        assert {(t["loss"], t["fusion_options"]["answers"]) for t in trials} == {("ce", "text")}

    @pytest.mark.slow
    def test_a_step_s_cost_is_that_of_learning(self, cachefuse, tokens, folder, monkeypatch):
        config = TrainConfig(fusion="midfusion", fusion_options={"answers": "text", "decoder_layers": 1, "width": 8})
        training = open_training_data(FeatureStore(folder / "workspace/cache/vqa2.zarr"), views=config.reads)
        steps, real = [], AnswerWriter.learn
        monkeypatch.setattr(AnswerWriter, "learn", lambda self, *args: steps.append(1) or real(self, *args))
        assert measure_costs(training, training.resolve(config)).steps_per_second > 0
        assert steps

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (("--loss", "bce"), "answers=text loss bce"),
            (("--class-weights", "balanced"), "answers=text weights loss"),
            (("--thresholds", "class"), "thresholds"),
            (("--fusion-options", "t5=hf:./nowhere"), "hf:./nowhere"),
        ],
    )
    @pytest.mark.one_in(2)
    def test_what_does_not_fit(self, cachefuse, tokens, given, message):
        result = cachefuse("train-head", *WRITES, *given)
        assert result.code == 1
        assert says(result.error, message)

    @pytest.mark.parametrize("task", ["multilabel", "multitask"])
    def test_a_row_of_several_labels_has_no_one_answer(self, task):
        config = TrainConfig(fusion="midfusion", fusion_options={"answers": "text", "decoder_layers": 1})
        with pytest.raises(ConfigError, match=naming(f"answers=text {task}")):
            resolve(config, task, 100)

    def test_an_edited_run_is_refused(self, cachefuse, tokens, folder):
        cachefuse(
            "train-head", *WRITES, "--fusion-options", "width=16", "--fusion-options", "text_view=ids", "--epochs", "1"
        )
        path = folder / "workspace/runs/vqa2-midfusion-decoder-ce-1/run.json"
        whole = json.loads(path.read_text())
        for spoilt in ([["a"]] * 7, [[10**9]] * 7, [], 3, [[]] * 7, [[1, 2]] * 3):
            for settings in (whole["config"], *(member["config"] for member in whole["members"])):
                settings["fusion_options"]["answer_tokens"] = spoilt
            path.write_text(json.dumps(whole))
            reseal(path.parent)
            result = cachefuse("predict")
            assert result.code == 1
            assert says(result.error, "run.json") or says(result.error, "weights")


def test_targets_are_how_right_each_answer_is(cachefuse, extracted, folder):
    store = FeatureStore(folder / "workspace/cache/vqa2.zarr")
    training = open_training_data(store)
    rows = training.rows("train", "val")
    targets = training.targets(rows)
    assert targets.shape == (180, len(store.classes))
    for c in range(len(store.classes)):
        alone = np.full(len(rows), c)
        np.testing.assert_allclose(targets[:, c], vqa_accuracy(alone, store.targets[rows.numpy()]), atol=1e-6)
    assert {*np.unique(targets).tolist()} == {0.0, *np.float32([0.3, 0.6]).tolist(), 1.0}
    learnt = training.table.targets[rows]
    assert {*learnt.unique().tolist()} == {0.0, *np.float32([1 / 3, 2 / 3]).tolist(), 1.0}


def test_notebooks_get_the_features_of_a_question_s_image(cachefuse, extracted, folder):
    x, y = open_features("vqa2", workspace=folder / "workspace").split("train")
    assert (x.shape, y.shape) == ((120, 724 + 1024), (120, 10))
    store = FeatureStore(folder / "workspace/cache/vqa2.zarr")
    stored = store.open_features("classic", "image").rows()[:]
    np.testing.assert_array_equal(x["image"], stored[store.feature_rows("image")[:120]])
    np.testing.assert_array_equal(x[4:9]["image"], x["image"][4:9])
    table = x[4:9].to_table(torch.zeros(5, 1), np.array(["train"] * 5))
    np.testing.assert_array_equal(table.batch(torch.tensor([0, 3]))[0]["image"].numpy(), x["image"][[4, 7]])


def test_shuffled_images_are_other_questions_images(cachefuse, extracted, folder):
    training = open_training_data(FeatureStore(folder / "workspace/cache/vqa2.zarr"))
    rows = torch.arange(len(training.table.labelled))
    own, theirs = (
        table.batch(rows)[0]["image"] for table in (training.table, training.table.shuffled({"image": 1.0}, 0))
    )
    assert sorted(map(bytes, own.numpy())) == sorted(map(bytes, theirs.numpy()))
    assert (own != theirs).any(1).float().mean() > 0.9


def test_questions_of_one_s_own(cachefuse, extracted, folder):
    """A table of them: an answer that all of fewer than three people gave is wholly right."""
    rows = [f"{i},train2014/COCO_train2014_{i:012d}.jpg,Which?,{['red', 'green'][i % 2]}" for i in range(1, 41)]
    (folder / "data/own.csv").write_text("\n".join(["id,image,question,answers", *rows, "41,,Which?,red|red|red|blue"]))
    (folder / "own.toml").write_text(
        'name = "own"\ntask = "vqa"\n[reader]\nkind = "table"\nfiles = { train = "own.csv" }\nid = "id"\n'
        'image = "image"\ntext = "question"\nlabels = "answers"\nseparator = "|"\n'
    )
    assert cachefuse("extract", "--dataset", "./own.toml", "--data-dir", extracted, "--encoder", "classic").code == 0
    store = FeatureStore(folder / "workspace/cache/own.zarr")
    red, blue = store.classes.index("red"), store.classes.index("blue")
    assert store.targets[40].tolist() == [red, red, red, blue, *[-1] * 6]
    result = cachefuse("train-head", "--dataset", "own", "--epochs", "40", "--json")
    assert json.loads(result.out)["metrics"]["train"]["vqa_accuracy"] > 0.95
