"""The settings of the papers' experiments, with the place of each; texts and tables disagree in some."""

from cachefuse.experiments.recipe import CROSS_ENTROPY, Chosen, Recipe, Stated

YOURS = "how often to train, and on which rows: yours"
NONE = "the paper has none"
# Settings of every training that no paper mentions.
ABSENT = (
    *(
        Chosen(name, value, NONE)
        for name, value in {
            "class_weights": "none", "sampler": "shuffle", "clip_norm": 0.0, "ema": 0.0, "modality_dropout": 0.0,
            "shuffle": {}, "standardize": "none",
        }.items()
    ),
    Chosen("decay", "all", "the paper leaves no parameter out"),
)  # fmt: skip
IDLE = {
    "accumulate": "the gradient is the same; it saves memory",
    "loss_options": "a cross-entropy has none of interest",
    "threshold_metric": "no threshold is chosen",
    "calibrate": "no threshold is chosen",
    **dict.fromkeys(("folds", "duplicates", "members", "refit", "seed"), YOURS),
}
CONSTANT = Chosen("schedule", "constant", "no schedule is stated")
HALF = Chosen("thresholds", "none", "no threshold is stated: 0.5")
WHOLE = Chosen("ablate", (), "the whole method")

MMC = "Multimodal Multilabel Classification by CLIP"
# Tables 1 and 5: the initial settings. Each table takes over what the ones before it chose.
MMC_BASE = Recipe(
    MMC,
    "tables 1 and 5: the initial settings",
    (
        Stated("views", "pooled", "section 3.1, table 5: one vector of 768 per modality"),
        Stated("fusion", "sum", "section 4.2.2"),
        Stated("scheme", "staged", "sections 3.2 and 5: each head alone, then the meta-classifier"),
        Stated("head", "mlp", "section 4.2.1"),
        Stated("layers", (2048,), "table 5"),
        Stated("activation", "gelu", "table 1"),
        Stated("dropout", 0.5, "table 1"),
        Stated("loss", CROSS_ENTROPY, "section 4.2.3"),
        Stated("optimizer", "adam", "table 1"),
        Stated("lr", 1e-3, "table 1"),
        Stated("epochs", 200, "table 1"),
        Stated("batch_size", 0, "section 4.1.2: all rows"),
        Stated("monitor", "samples_f1", "section 4.1.1: the mean F1"),
        Stated("patience", 0, "section 4.2.2: the last scores"),
        Stated("thresholds", "none", "section 5: other thresholds than 0.5 are future work"),
    ),
    (
        CONSTANT,
        Chosen("weight_decay", 0.0, NONE),
        *(known for known in ABSENT if known.name != "ema"),
        Chosen("ema", 0.0, "section 3.4 describes it, but no table uses it, and no decay is stated"),
    ),
    {**IDLE, "fusion_options": "the fusion has none", "ablate": "the fusion has no parts", "stages": "scheme staged"},
    features=(
        Stated("--encoder", "CLIP, 768 wide (ViT-L/14)", "section 3.1 and table 5"),
        Stated("rows", "25,000 train, 5,000 val", "section 4.1.2"),
    ),
)
BEFORE = Chosen("loss", CROSS_ENTROPY, "the losses are compared after this table; section 4.2.3 chooses this one")
LAYERS_4 = Stated("layers", (2048, 512), "section 4.3.1")
EPOCHS_300 = Stated("epochs", 300, "section 4.3.3")


def _mmc(title: str, *stated: Stated, chosen: tuple[Chosen, ...] = (), varies: dict[str, str]) -> Recipe:
    return MMC_BASE.but(title, *stated, chosen=chosen, varies=varies)


MMC_TABLES = {
    "mmc-heads": _mmc(
        "table 2: heads, image only", Stated("fusion", "image", "section 4.2.1"), chosen=(BEFORE,),
        varies={"head": "table 2"},
    ),
    "mmc-fusion": _mmc("table 3: fusion", chosen=(BEFORE,), varies={"fusion": "table 3"}),
    "mmc-losses": _mmc(
        "table 4: losses", Stated("epochs", 300, "section 4.2.3"),
        varies={"loss": "table 4", "loss_options": "section 4.2.3"},
    ),
    "mmc-layers": _mmc("table 6: hidden layers", varies={"layers": "table 6"}),
    "mmc-batch": _mmc(
        "table 7: batches of 1, 0.4, 0.2 of the training rows; learning rate", LAYERS_4,
        varies={"batch_size": "table 7", "lr": "table 7"},
    ),
    "mmc-epochs": _mmc("table 8: epochs", LAYERS_4, varies={"epochs": "table 8"}),
    "mmc-activation": _mmc(
        "table 9: activations", LAYERS_4, EPOCHS_300, varies={"activation": "table 9"},
    ),
    "mmc-dropout": _mmc(
        "tables 10 and 11: dropout", LAYERS_4, EPOCHS_300,
        varies={"activation": "table 10", "dropout": "tables 10 and 11"},
    ),
    "mmc-greedy": _mmc(
        "table 5: one choice after another, then the best on all rows",
        Stated("refit", True, "section 4.5: train with no validation data"),
        varies=dict.fromkeys(("layers", "batch_size", "lr", "epochs", "activation", "dropout"), "table 5"),
    ),
}  # fmt: skip
MMC_PAPER = MMC_BASE.but(
    "section 4.5 and table 12: the best pipeline",
    Stated("layers", (2048, 512), "section 4.5: 4 layers; section 4.3.1"),
    Stated("dropout", 0.6, "table 12"),
    Stated("epochs", 300, "table 12"),
    Stated("lr", 1e-3, "table 12; the text of section 4.5 says 1e-4, but every other table 1e-3"),
    Stated("batch_size", 0, "table 12: 30,000, all rows"),
    Stated("refit", True, "section 4.5: train with no validation data"),
)

CMA = "CMA-CLIP: Cross-Modality Attention CLIP for Text-Image Classification"
CMA_PAPER = Recipe(
    CMA,
    "section 3.2, warm-up stage",
    (
        Stated("fusion", "cma", "section 2"),
        Stated("fusion_options.depth", 12, "section 3.2.1"),
        Stated("fusion_options.width", 512, "section 3.2.1"),
        Stated("fusion_options.heads", 8, "section 3.2.1"),
        Stated("fusion_options.pool", "", "section 2.2: all tokens"),
        Stated("head", "mlp", "section 2.3"),
        Stated("optimizer", "adam", "section 3.2.1"),
        Stated("weight_decay", 1e-4, "section 3.2.1"),
        Stated("lr", 1e-5, "section 3.2.1"),
        Stated("batch_size", 1024, "section 3.2.1"),
        Stated("epochs", 100, "section 3.2.2; 20 for APA"),
        Stated("monitor", "loss", "section 3.2.2: the checkpoint with the lowest validation loss"),
        Stated("stages", (), "section 3.2.2: one task needs no tuning stage"),
    ),
    (
        Chosen("patience", 100, "as many as epochs: the best is kept, and training never stops earlier"),
        Chosen("loss", CROSS_ENTROPY, "the loss is not stated; this is the usual one of a classification"),
        Chosen("fusion_options.dropout", 0.1, "not stated; BERT's, whose blocks section 2.2 takes"),
        Chosen("dropout", 0.1, "not stated; as in the blocks"),
        Chosen("layers", (512,), "the MLP's size is not stated; the width of the transformer"),
        Chosen("activation", "relu", "not stated"),
        CONSTANT, HALF, WHOLE, *ABSENT,
    ),
    {**IDLE, "views": "the fusion reads class tokens and tokens", "scheme": "there is one head"},
    for_tasks=(Stated("stages", ("warm-up", "tuning"), "section 3.2.2: the tuning stage of several tasks"),),
    features=(Stated("--encoder", "clip:ViT-B-32@openai", "section 3.2.1"),
              Stated("--views", "pooled,tokens", "section 2.2")),
    notes=(
        "The end-to-end stage (300 epochs, section 3.2.2) trains the encoders; cached features cannot give it.",
        "Each modality has a linear map to the width, which the paper does not mention; its image tokens are 768 wide.",
    ),
)  # fmt: skip
CMA_IRRELEVANT = CMA_PAPER.but(
    "section 4: with and without the attentions, where texts say nothing of the label",
    Stated("epochs", 20, "section 3.2.2: APA"),
    chosen=(Chosen("patience", 20, "as many as epochs: the best is kept, and training never stops earlier"),),
    varies={"ablate": "section 4", "shuffle": "imitates APA's titles without a colour or pattern, section 4"},
)

LIT = "Leveraging Efficient Training and Feature Fusion in Transformers for Multimodal Classification"
LIT_PAPER = Recipe(
    LIT,
    "section 4.1: locked image, tuned text, TIRG",
    (
        Stated("fusion", "lit", "section 3"),
        Stated("fusion_options.grid", 0, "section 4.1: all 49 image tokens"),
        Stated("ablate", (), "section 3.3: with TIRG"),
        Stated("head", "mlp", "section 3.1"),
        Stated("loss", CROSS_ENTROPY, "section 3.2"),
        Stated("lr", 5e-5, "section 4.1"),
        Stated("batch_size", 128, "section 4.1"),
        Stated("epochs", 30, "section 4.1"),
    ),
    (
        Chosen("fusion_options.text_model", "", "the encoder of the cached ids; the paper has BERT"),
        Chosen("optimizer", "adam", "not stated"),
        Chosen("weight_decay", 0.0, "not stated"),
        Chosen("dropout", 0.1, "not stated; BERT's"),
        Chosen("layers", (512,), "the MLP's size is not stated"),
        Chosen("activation", "relu", "not stated"),
        Chosen("patience", 0, "not stated: the last epoch"),
        CONSTANT, HALF, *ABSENT,
    ),
    {**IDLE, "views": "the fusion reads ids, pooled features and tokens", "scheme": "there is one head",
     "stages": "the fusion has one", "monitor": "the last epoch is kept"},
    features=(
        Stated("--max-tokens", 256, "sections 4 and 4.1: of a text"),
        Stated("--encoder", "hf:bert-base-uncased", "section 4.1: 12 layers, 768 wide"),
        Stated("--encoder", "clip:ViT-B-32@openai", "section 4.1; section 3.1 says ViT-B/32 of ImageNet"),
        Stated("--views", "pooled,tokens,ids", "section 3.1"),
        Stated("texts of FashionGen", "without their first sentence", "section 4"),
    ),
    notes=(
        "f is the mean of the text's tokens; the paper says the pooled output of the transformer.",
        "The row without LiT trains the image encoder; cached features cannot give it. ViLT is another model.",
    ),
)  # fmt: skip
LIT_TABLE = LIT_PAPER.but(
    "table 1: text, image, and both with and without parts",
    varies={"fusion": "table 1", "ablate": "table 1", "fusion_options": "table 1: MMBT's few image tokens"},
)

FUSE = "Where to Fuse"
WHERE_TO_FUSE = Recipe(
    FUSE,
    "sections 3.2 and 3.3: score and speed by the layer at which images join",
    (
        Stated("fusion", "midfusion", "section 2.2"),
        Stated("loss", CROSS_ENTROPY, "section 1.3.1: T5 writes the answer"),
        Stated("patience", 0, "section 3.2: the last step's accuracy, and the highest of all steps"),
    ),
    (
        Chosen("epochs", 5, "the number of steps is not stated; few, as T5 is pretrained"),
        Chosen("batch_size", 64, "not stated"),
        Chosen("lr", 3e-4, "not stated"),
        Chosen("optimizer", "adam", "not stated"),
        Chosen("weight_decay", 0.0, "not stated"),
        Chosen("dropout", 0.1, "not stated; T5's"),
        Chosen("layers", (512,), "a head only replaces T5's words where rows have several labels"),
        Chosen("activation", "relu", "as layers"),
        Chosen("head", "mlp", "as layers"),
        CONSTANT, HALF, WHOLE, *ABSENT,
    ),
    {**IDLE, "views": "the fusion decides", "scheme": "there is one head", "stages": "the fusion has one",
     "monitor": "the last epoch is kept"},
    varies={"fusion_options": "figures 16, 19 to 22: layers, decoders and pooling"},
    features=(
        Stated("--encoder", "hf:google/vit-base-patch16-224-in21k", "section 2.2: 196 tokens of 768"),
        Stated("--fusion-options", "t5=hf:t5-base", "section 2.2: a pretrained T5; its layers are 12 in section 3.2"),
        Stated("rows", "80% train, 20% to measure, at random", "section 2.3"),
    ),
    notes=(
        "Without t5 the encoder is trained from scratch; layers and decoders are scaled to the layers that it has.",
        "Answers are written by the decoder with t5 and one answer per row; else a head scores the classes.",
    ),
)  # fmt: skip

SWEEPS = {**MMC_TABLES, "cma-irrelevant": CMA_IRRELEVANT, "lit-table": LIT_TABLE, "where-to-fuse": WHERE_TO_FUSE}
TRAININGS = {"cma-paper": CMA_PAPER, "lit-paper": LIT_PAPER, "mmc-paper": MMC_PAPER}
