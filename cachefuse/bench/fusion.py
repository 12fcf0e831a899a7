"""`cachefuse bench fusion`: a training step over tokens against its matrix products, and the cost of each fusion."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from cachefuse.bench.base import MANIFEST, N_CLASSES, OnProgress, measure_all, temporary
from cachefuse.bench.timing import BenchRow, in_turns, timed
from cachefuse.data.column import Column
from cachefuse.data.dataset import Dataset
from cachefuse.data.images import FileImage
from cachefuse.data.manifest import parse_manifest
from cachefuse.device import resolve_device
from cachefuse.experiments.costs import measure_costs
from cachefuse.extraction.open_store import open_store
from cachefuse.feature_spec import IDS
from cachefuse.files import JsonObject
from cachefuse.fusion import FUSIONS
from cachefuse.nn.transformer import EXPANSION
from cachefuse.store.store import FeatureStore
from cachefuse.store.writer import ViewWriter
from cachefuse.threads import same_threads
from cachefuse.training.batches import Batches
from cachefuse.training.build import build_training
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TrainingData, open_training_data
from cachefuse.training.loop import Optimization, fit
from cachefuse.training.optim import adam
from cachefuse.training.resolved import ResolvedConfig

VOCABULARY = 30_522  # BERT's
BERT = {"model_type": "bert", "vocab_size": VOCABULARY, "hidden_size": 384, "num_hidden_layers": 6,
        "num_attention_heads": 12, "intermediate_size": 1536, "max_position_embeddings": 512}  # fmt: skip


@dataclass(frozen=True)
class FusionSizes:
    """The sizes of features, as of ViT-S/14 and MiniLM, and of cma. The defaults take a few minutes on two cores."""

    pairs: int = 5
    rows: int = 256
    batch: int = 32
    width: int = 384
    image_tokens: int = 256
    text_tokens: int = 32
    heads: int = 6
    depth: int = 2


@dataclass
class FusionBench:
    """The data that the measurements share: a store of random features, pooled, tokens and ids."""

    folder: Path
    device: str
    sizes: FusionSizes
    speeds: dict[str, float] = field(default_factory=dict)  # steps per second of each midfusion measured

    @cached_property
    def store(self) -> FeatureStore:
        return write_tokens(self.folder / "tokens.zarr", self.sizes)

    def data(self, config: TrainConfig) -> TrainingData:
        return open_training_data(self.store, device=self.device, views=config.reads)


def write_tokens(path: Path, sizes: FusionSizes) -> FeatureStore:
    """Write a store of random float16 features of images and texts: pooled, tokens, and the texts' token ids."""
    rng, n = np.random.default_rng(0), sizes.rows
    dataset = Dataset(
        manifest=parse_manifest(MANIFEST, "bench.toml"),
        classes=tuple(f"class {c}" for c in range(N_CLASSES)),
        ids=[f"{row:08d}" for row in range(n)],
        splits=np.array(["train"] * n),
        targets=(rng.random((n, N_CLASSES), np.float32) < 0.2).astype(np.int8),
        modalities={
            "image": Column([FileImage(Path(f"{row}.jpg")) for row in range(n)]),
            "text": Column.texts([("a text",)] * n),
        },
        name="bench",
    )
    store = open_store(path, dataset)
    for modality, n_tokens in (("image", sizes.image_tokens), ("text", sizes.text_tokens)):
        views = {"pooled": (sizes.width,), "tokens": (n_tokens, sizes.width)}
        views |= {IDS: (n_tokens,)} if modality == "text" else {}
        dtypes = {view: "int32" if view == IDS else "float16" for view in views}
        provenance = {"family": "bench", "dtype": "float16", "tokenizer": "bench"}
        features = store.require_features("bench", modality, provenance, "bench", dtypes)
        for view, shape in views.items():
            kind: JsonObject = {"ragged": modality == "text" and view != "pooled", "dtype": dtypes[view]}
            features.begin(features.new_view(view, shape, **kind, vocabulary=VOCABULARY if view == IDS else 0))
            with ViewWriter(features, view, **kind) as writer:
                for row in range(n):
                    if view == IDS:
                        value = rng.integers(VOCABULARY, size=shape).astype(np.int32)
                    else:
                        value = rng.standard_normal(shape, np.float32).astype(np.float16)
                    writer.add(np.array([row]), [value])
    return store


def cma_step(bench: FusionBench) -> BenchRow:
    """Measure a training step of cma, with its reads, against only its matrix products and attention."""
    sizes = bench.sizes
    options = {"depth": sizes.depth, "width": sizes.width, "heads": sizes.heads}
    given = TrainConfig(fusion="cma", fusion_options=options, batch_size=sizes.batch, loss="bce")
    data = bench.data(given)
    config = data.resolve(given)
    steps = -(-sizes.rows // sizes.batch)
    products = step_products(bench)
    whole = step_products(bench, trimmed=False)
    epoch = _epoch(data, config)
    pairs = in_turns(lambda: epoch() / steps, timed(products), sizes.pairs)
    ours, baseline = (1000 * np.median(pairs, axis=0)).tolist()
    all_tokens = 1000 * float(np.median([timed(whole)() for _ in range(sizes.pairs)]))
    n_tokens = sizes.image_tokens + sizes.text_tokens + 2
    return BenchRow(
        "cma", f"cma, {sizes.depth} x {sizes.width}, a step / GEMMs, attention", "ms", ours, baseline,
        float(np.median(pairs[:, 1] / pairs[:, 0])), goal=0.6,
        note=f"{sizes.batch} rows of {n_tokens} tokens, read from the store, with dropout and Adam; the last layer maps"
        f" only class tokens: products of whole layers take {all_tokens:.0f} ms",
    )  # fmt: skip


def _epoch(data: TrainingData, config: ResolvedConfig) -> Callable[[], float]:
    """Return a function that measures the seconds of the second epoch of ``fit``."""

    def epoch() -> float:
        model, training_set, loss = build_training(data, config, data.train_rows())
        ends: list[float] = []
        module = training_set.reading(model.fusion)
        generator = torch.Generator().manual_seed(0)
        fit(
            module,
            loss,
            Batches(training_set.table, training_set.rows, config.effective_batch_size, generator),
            Optimization(adam(module.parameters(), lr=1e-4)),
            epochs=2,
            on_epoch=lambda epoch: ends.append(time.perf_counter()),
        )
        return ends[1] - ends[0]

    return epoch


def step_products(bench: FusionBench, trimmed: bool = True) -> Callable[[], None]:
    """Return a function that computes one step's products: forward and both gradients; attention forward and backward.

    If ``trimmed``, the last layer computes only the class tokens.
    """
    sizes, device = bench.sizes, bench.device
    b, w, t = sizes.batch, sizes.width, sizes.image_tokens + sizes.text_tokens + 2
    shapes = [(b * t, w, w, False)]  # rows, in, out, whether the layer below needs a gradient
    n_queries = []
    for layer in range(sizes.depth):
        queries = 2 if trimmed and layer == sizes.depth - 1 else t
        shapes += [(b * queries, w, w, True), (b * t, w, 2 * w, True), (b * queries, w, w, True)]
        shapes += [(b * queries, w, EXPANSION * w, True), (b * queries, EXPANSION * w, w, True)]
        n_queries.append(queries)
    layers = [
        (torch.randn(n, i, device=device), torch.randn(o, i, device=device), torch.randn(n, o, device=device), below)
        for n, i, o, below in shapes
    ]
    head = w // sizes.heads
    tensors = [
        [torch.randn(b, sizes.heads, n, head, device=device, requires_grad=True) for n in (queries, t, t)]
        for queries in n_queries
    ]

    def step() -> None:
        for x, weight, gradient, below in layers:
            x @ weight.T
            gradient.T @ x
            if below:
                gradient @ weight
        for q, k, v in tensors:
            out = scaled_dot_product_attention(q, k, v)
            torch.autograd.grad(out, (q, k, v), out.detach())
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    step()
    return step


def later_fusion(bench: FusionBench, layer: int, pool: str = "") -> BenchRow:
    """Measure midfusion's steps per second if images join at a layer, pooled or not, against joining at 0."""
    depth = 4
    early = _steps(bench, 0, "", depth)
    ours = _steps(bench, layer, pool, depth)
    kind = pool.partition("=")[2]
    what = f"midfusion, images at {layer}{', ' + kind if kind else ''} / at 0"
    name = "_".join(["midfusion", str(layer), *pool.partition("=")[2].split(":")]).rstrip("_")
    return BenchRow(name, what, "steps/s", ours, early, ours / early)


def _steps(bench: FusionBench, layer: int, pool: str, depth: int) -> float:
    key = f"{layer} {pool}"
    if key not in bench.speeds:
        options = {"fusion_spec": f"0:text,{layer}:image", "pool": pool, "depth": depth}
        config = TrainConfig(fusion="midfusion", fusion_options=options, batch_size=bench.sizes.batch, loss="bce")
        data = bench.data(config)
        bench.speeds[key] = measure_costs(data, data.resolve(config)).steps_per_second
    return bench.speeds[key]


def prediction(bench: FusionBench, fusion: str) -> BenchRow:
    """Measure the time to predict one sample from cached features."""
    options = {"architecture": BERT} if fusion == "lit" else {}
    config = TrainConfig(fusion=fusion, fusion_options=options, batch_size=bench.sizes.batch, loss="bce")
    data = bench.data(config)
    costs = measure_costs(data, data.resolve(config))
    note = f"{costs.parameters / 1e6:.2f}M parameters, {costs.steps_per_second:.1f} steps/s of {bench.sizes.batch} rows"
    return BenchRow(f"item_{fusion}", f"{fusion}: predict one row", "ms", costs.ms_per_item, note=note)


MEASUREMENTS: dict[str, Callable[[FusionBench], BenchRow]] = {
    "a step of cma": cma_step,
    "joining halfway": partial(later_fusion, layer=2),
    "joining last": partial(later_fusion, layer=4),
    "pooled to 14": partial(later_fusion, layer=0, pool="image=mean:14"),
    "pooled to 1": partial(later_fusion, layer=0, pool="image=mean:1"),
    "pooled to 14 by attention": partial(later_fusion, layer=0, pool="image=attention:14"),
    **{fusion: partial(prediction, fusion=fusion) for fusion in FUSIONS if not FUSIONS[fusion].solved},
}


@same_threads()
def bench_fusion(
    folder: Path,
    *,
    device: str = "auto",
    sizes: FusionSizes | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> list[BenchRow]:
    """Measure fusions on random features, in a temporary folder inside ``folder``.

    Raises ConfigError for a missing device.
    """
    sizes, device = sizes or FusionSizes(), resolve_device(device)
    with temporary(folder) as own_folder:
        return measure_all(MEASUREMENTS, FusionBench(own_folder, device, sizes), on_progress)
