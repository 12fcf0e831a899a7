"""`cachefuse bench train`: epochs of training against only their matrix products, and against other ways to train."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cachefuse.bench.base import N_CLASSES, OnProgress, measure_all, temporary, write_store
from cachefuse.bench.timing import BenchRow, in_turns, rates, seconds, timed
from cachefuse.device import resolve_device
from cachefuse.fusion.base import Model
from cachefuse.fusion.model import FusionModel
from cachefuse.nn.losses import Loss
from cachefuse.store.store import FeatureStore
from cachefuse.threads import same_threads
from cachefuse.training.batches import Batches
from cachefuse.training.build import training_loss, untrained_model
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import TrainingData, TrainingSet, open_training_data
from cachefuse.training.feature_table import FeatureTable
from cachefuse.training.loop import Optimization, fit
from cachefuse.training.optim import adam
from cachefuse.training.resolved import ResolvedConfig, resolve
from cachefuse.training.stack import RowsFirst, StackedLoss, stack

RATE = 1e-3
Layers = tuple[int, ...]  # hidden widths; () for a linear head


@dataclass(frozen=True)
class TrainSizes:
    """The sizes of the trainings. The defaults take two to five minutes on two cores."""

    pairs: int = 7
    epochs: int = 10  # of a light head; its time is their mean
    rows: int = 25_000
    width: int = 768
    batch: int = 4096
    small: Layers = (256,)
    large: Layers = (2048, 512)
    heads: int = 64


@dataclass
class TrainBench:
    """The data that the measurements share: random features as in a store, float16, and as in training, float32."""

    folder: Path
    device: str
    sizes: TrainSizes

    @cached_property
    def data(self) -> TrainingData:
        """Features in a store's files, all read once, so their checksums are verified."""
        path = self.folder / "rows.zarr"
        write_store(path, self.sizes.rows, self.sizes.width)
        data = open_training_data(FeatureStore(path), device=self.device)
        data.table.batch(torch.arange(self.sizes.rows, device=self.device))
        return data

    @cached_property
    def training_set(self) -> TrainingSet:
        """All rows, standardised in memory, with their ``Standardize`` modules."""
        rows = torch.arange(self.sizes.rows, device=self.device)
        table, model = self.data.table, self.model(())
        model.fit_statistics(table.features, table.present, rows)
        x = model.standardize["text"](table.batch(rows)[0]["text"])
        return TrainingSet(replace(table, features={"text": x}), rows, model.standardize)

    def model(self, layers: Layers) -> FusionModel:
        """Return an untrained model: a linear head, or an MLP with hidden layers."""
        return untrained_model(self.data, settings(layers))

    def epoch(
        self,
        module: Model,
        table: FeatureTable,
        n: int,
        loss: Loss | None = None,
        sample_weights: Tensor | None = None,
    ) -> float:
        """Return the seconds of an epoch of ``fit``: the mean of ``n`` epochs after the first."""
        ends: list[float] = []
        generator = torch.Generator().manual_seed(0)
        fit(
            module,
            loss or training_loss(self.data, settings(()), self.training_set),
            Batches(table, self.training_set.rows, self.sizes.batch, generator, sample_weights),
            Optimization(adam(module.parameters(), lr=RATE)),
            epochs=1 + n,
            on_epoch=lambda epoch: ends.append(time.perf_counter()),
        )
        return (ends[-1] - ends[0]) / n

    def wait(self) -> None:
        """Wait until a GPU has finished."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def settings(layers: Layers) -> ResolvedConfig:
    head = "mlp" if layers else "linear"
    given = TrainConfig(fusion="text", head=head, layers=layers or None, activation="gelu", dropout=0.5, loss="bce")
    return resolve(given, "multilabel", TrainSizes().rows)


def linear(bench: TrainBench) -> BenchRow:
    """Measure a linear head's epoch against its matrix products."""
    return _over_gemms(bench, (), bench.sizes.epochs, "linear", "linear head", goal=0.75)


def linear_drawn(bench: TrainBench) -> BenchRow:
    """Measure the same with rows that are drawn, and so copied, one by one."""
    sample_weights = torch.ones(bench.sizes.rows, dtype=torch.float64)
    note = "rows are drawn one by one, as --sampler balanced does; otherwise batches are slices of shuffled rows"
    return _over_gemms(
        bench, (), bench.sizes.epochs, "linear_drawn", "linear, rows drawn", sample_weights=sample_weights, note=note
    )


def small_mlp(bench: TrainBench) -> BenchRow:
    return _over_gemms(bench, bench.sizes.small, bench.sizes.epochs, "mlp", "MLP")


def large_mlp(bench: TrainBench) -> BenchRow:
    return _over_gemms(bench, bench.sizes.large, 1, "mlp_large", "MLP", goal=0.70)


def dataloader(bench: TrainBench) -> BenchRow:
    """Measure a linear head's epoch against the loop of PyTorch's tutorials."""
    fusion, table = bench.model(()).fusion, bench.training_set.table
    x: Any = table.features["text"]
    loader = DataLoader(
        TensorDataset(x.cpu(), bench.training_set.targets.cpu().float()), batch_size=bench.sizes.batch, shuffle=True
    )
    head = nn.Linear(bench.sizes.width, N_CLASSES).to(bench.device)
    optimizer = torch.optim.Adam(head.parameters(), lr=RATE)

    def baseline() -> None:
        for inputs, targets in loader:
            loss = F.binary_cross_entropy_with_logits(head(inputs.to(bench.device)), targets.to(bench.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        bench.wait()

    pairs = in_turns(lambda: bench.epoch(fusion, table, bench.sizes.epochs), timed(baseline), bench.sizes.pairs)
    return rates(pairs, bench.sizes.rows / 1000, "dataloader", "linear head / a DataLoader loop", "krow/s", goal=3)


def mapped(bench: TrainBench) -> BenchRow:
    """Measure a large MLP's epoch on stored features, against features in memory as in training."""
    fusion = bench.model(bench.sizes.large).fusion
    stored = FusionModel(fusion, bench.training_set.standardize or "features")
    pairs = in_turns(
        lambda: bench.epoch(stored, bench.data.table, 1),
        lambda: bench.epoch(fusion, bench.training_set.table, 1),
        bench.sizes.pairs,
    )
    on_cpu = bench.device == "cpu"  # a GPU holds both in its memory
    what = "mapped float16 / resident float32" if on_cpu else "float16 / float32 standardised"
    return rates(pairs, bench.sizes.rows / 1000, "mapped", what, "krow/s", goal=0.97, note="the larger of the two MLPs")


def together(bench: TrainBench) -> BenchRow:
    """Measure an epoch of linear heads trained together, against one after the other."""
    table, n = bench.training_set.table, bench.sizes.heads
    single = bench.model(()).fusion
    stacked = RowsFirst(stack([bench.model(()).fusion for _ in range(n)]))
    loss = StackedLoss(bench.data, [settings(())] * n, bench.training_set)
    pairs = in_turns(
        lambda: bench.epoch(stacked, table, 1, loss), lambda: n * bench.epoch(single, table, n), bench.sizes.pairs
    )
    return rates(pairs, n * bench.sizes.rows / 1000, "together", f"{n} linear heads / one by one", "krow/s", goal=2.2)


MEASUREMENTS: dict[str, Callable[[TrainBench], BenchRow]] = {
    "a linear head": linear,
    "a linear head on drawn rows": linear_drawn,
    "a small MLP": small_mlp,
    "a larger MLP": large_mlp,
    "a DataLoader": dataloader,
    "features in files": mapped,
    "heads together": together,
}


@same_threads()
def bench_train(
    folder: Path,
    *,
    device: str = "auto",
    sizes: TrainSizes | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> list[BenchRow]:
    """Measure the training of heads on random features, in a temporary folder inside ``folder``.

    Raises ConfigError for a missing device.
    """
    sizes, device = sizes or TrainSizes(), resolve_device(device)
    with temporary(folder) as own_folder:
        return measure_all(MEASUREMENTS, TrainBench(own_folder, device, sizes), on_progress)


def matrix_products(x: Any, layers: Layers, batch: int) -> Callable[[], None]:
    """Return a function that computes an epoch's products: forward, and all gradients except that of ``x`` (N, D)."""
    sizes = list(pairwise((x.shape[1], *layers, N_CLASSES)))
    weights = [torch.randn(n_out, n_in, device=x.device) / n_in**0.5 for n_in, n_out in sizes]
    gradients = [torch.empty_like(weight) for weight in weights]
    outputs = [torch.empty(batch, n_out, device=x.device) for _, n_out in sizes]
    deltas = [torch.randn_like(output) for output in outputs]

    def epoch() -> None:
        for rows in x.split(batch):
            n = len(rows)
            inputs = [rows, *(output[:n] for output in outputs)]
            for i, weight in enumerate(weights):
                torch.mm(inputs[i], weight.T, out=outputs[i][:n])
            for i, weight in reversed(list(enumerate(weights))):
                torch.mm(deltas[i][:n].T, inputs[i], out=gradients[i])
                if i:
                    torch.mm(deltas[i][:n], weight, out=deltas[i - 1][:n])

    return epoch


def _over_gemms(
    bench: TrainBench,
    layers: Layers,
    n_epochs: int,
    name: str,
    what: str,
    sample_weights: Tensor | None = None,
    *,
    goal: float | None = None,
    note: str = "",
) -> BenchRow:
    fusion, table = bench.model(layers).fusion, bench.training_set.table
    products = matrix_products(table.features["text"], layers, bench.sizes.batch)

    def baseline() -> None:
        for _ in range(n_epochs):
            products()
        bench.wait()

    baseline()
    pairs = in_turns(
        lambda: bench.epoch(fusion, table, n_epochs, sample_weights=sample_weights),
        lambda: seconds(baseline) / n_epochs,
        bench.sizes.pairs,
    )
    shape = "-".join(map(str, (bench.sizes.width, *layers, N_CLASSES)))
    what = f"{what} {shape} / GEMMs" if layers else f"{what} / its GEMMs"
    return rates(pairs, bench.sizes.rows / 1000, name, what, "krow/s", goal=goal, note=note)
