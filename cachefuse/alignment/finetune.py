"""Fine-tuning: train one side of an alignment together with a linear head on a labelled dataset."""

import copy
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from cachefuse.alignment.config import TUNING_RATE
from cachefuse.alignment.model import Aligner
from cachefuse.alignment.run import Alignment, chose_epoch
from cachefuse.alignment.tower import aligned_features, side_spec
from cachefuse.alignment.train import find_side
from cachefuse.device import own_randomness, resolve_device, seed_everything
from cachefuse.errors import ConfigError
from cachefuse.feature_spec import FLAT, pooled_specs
from cachefuse.fusion import FUSIONS
from cachefuse.fusion.base import Model
from cachefuse.fusion.model import FusionModel
from cachefuse.nn.losses import build_loss
from cachefuse.nn.scaling import Standardize
from cachefuse.runs.features import record_features
from cachefuse.runs.results import compute_results
from cachefuse.runs.run import Member, Run, split_digest
from cachefuse.store.lock import only_writer
from cachefuse.store.store import FeatureStore
from cachefuse.training.batches import Batches
from cachefuse.training.build import build_model, build_optimization, build_validation
from cachefuse.training.config import TrainConfig
from cachefuse.training.data import VAL, TrainingData
from cachefuse.training.held_out import HeldOut, final_thresholds
from cachefuse.training.inference import predict_scores
from cachefuse.training.loop import History, fit
from cachefuse.training.resolved import ResolvedConfig
from cachefuse.training.selection import load_table, one_view
from cachefuse.training.train import TrainingProgress


class TunedModel(Model):
    """One side of an alignment and a head on it: stored features {modality: (B, T * D)} to logits (B, C)."""

    def __init__(self, aligner: Aligner, side: int, modality: str, head: FusionModel, n_tokens: int = 0):
        super().__init__()
        self.aligner, self.head = aligner, head
        self.modality, self._side, self._n_tokens = modality, side, n_tokens

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        return self.head({self.modality: self.embed(features)}, present)

    def embed(self, features: dict[str, Tensor]) -> Tensor:
        """Return the aligned vectors (B, W)."""
        x = features[self.modality]
        x = x.unflatten(1, (self._n_tokens or 1, -1))  # (B, T, D)
        # Flat tokens are padded with zeros, and a token of a frozen encoder is never all zeros.
        mask = (x != 0).any(-1) if self._n_tokens else torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        mask[:, 0] = True
        return self.aligner(self._side, (x, mask))


@own_randomness()
def fine_tune(
    run: Alignment,
    store: FeatureStore,
    runs: Path,
    *,
    modality: str = "image",
    epochs: int = 100,
    batch_size: int = 256,
    lr: float = TUNING_RATE,
    weight_decay: float = 0.0,
    patience: int = 0,
    seed: int = 0,
    device: str = "auto",
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
) -> tuple[Alignment, Run]:
    """Train one side of an alignment, from its aligned weights, together with a linear head on a labelled dataset.

    The paper's fine-tuning protocol (CBMF, section IV-C). The tuned alignment is written to a new folder in ``runs``,
    and its features are added to the store. The head is a second run that reads these features, so that ``predict``
    works on it; it is evaluated but not yet saved. The alignment counts as a run once the head is saved there. Raises
    ConfigError for a dataset without classes or a modality that the alignment lacks, RunError if the store lacks the
    features that the alignment reads.
    """
    begun = time.perf_counter()
    sides = [i for i, side in enumerate(run.sides) if side.modality == modality]
    if not sides:
        raise ConfigError(f"alignment {run.name} has no {modality} side to tune")
    side = sides[0]
    given = TrainConfig(
        fusion=modality if modality in FUSIONS else "concat", head="linear", optimizer="adamw", epochs=epochs,
        batch_size=batch_size, lr=lr,
        weight_decay=weight_decay, patience=patience, seed=seed,
    )  # fmt: skip
    view = run.config.views
    views = one_view(FLAT if view == "tokens" else view)
    table = load_table(store, {modality: [find_side(run, run.sides[side], store)]}, views).to(resolve_device(device))
    data = TrainingData.of(store, table)
    if data.task not in ("multiclass", "multilabel"):
        raise ConfigError(
            f"fine-tune needs a dataset with one set of labels; the task of {store.dataset} is {data.task}"
        )
    config = data.resolve(given)
    with only_writer(store.path):  # fails now, not after all epochs, if another process writes to the store
        pass
    train = data.train_rows().to(data.device)
    seed_everything(seed)
    tuned = replace(
        run, name=f"{run.name}-{store.dataset}", parent=run.name, model=copy.deepcopy(run.model), results={}
    )
    tuned.model.log_temperature.requires_grad_(False)
    head = build_model(config, pooled_specs({modality: run.config.width}), len(data.classes))
    model = TunedModel(tuned.model, side, modality, head, table.specs[modality].n_tokens).to(data.device)
    # Scale vectors of length 1 to values of about 1: their deviations are not fitted, since tuning changes them.
    cast(Standardize, head.standardize[modality]).scale.fill_(run.config.width**0.5)
    history = fit(
        model,
        build_loss(config.loss, config.loss_options),
        Batches(table, train, batch_size, torch.Generator().manual_seed(seed)),
        build_optimization(config, model, len(train)),
        epochs=config.epochs,
        validation=build_validation(data, config, data.rows(VAL)),
        on_epoch=lambda epoch: on_progress(TrainingProgress(1, 1, "", config.epochs, epoch)),
        keep_interrupted=True,
    )
    tuned.model.log_temperature.requires_grad_(True)
    tuned.history, tuned.seconds = history, time.perf_counter() - begun
    tuned.val_chose = run.val_chose or (run.dataset == store.dataset and chose_epoch(history))
    folder = tuned.save(runs, unfinished=True)
    try:
        return tuned, _head_run(tuned, side, store, config, head, history, device, begun)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # useless without its head
        raise


def _head_run(
    tuned: Alignment,
    side: int,
    store: FeatureStore,
    config: ResolvedConfig,
    head: FusionModel,
    history: History,
    device: str,
    begun: float,
) -> Run:
    """Write the tuned features to the store; return the head as a run that reads them, evaluated."""
    modality = tuned.sides[side].modality
    with only_writer(store.path):
        store.remove_features(side_spec(tuned, side).short, modality)  # of a killed call: the name was free
    features = aligned_features(tuned, side, store, device=device)
    table = load_table(store, {modality: [features]}).to(resolve_device(device))
    data = TrainingData.of(store, table, {modality: [features]})
    rows = data.rows(VAL)
    held_out = HeldOut.join(VAL, data, [rows], [predict_scores(head, table, rows, config.loss)])
    run = Run(
        name=f"{store.dataset}-{config.fusion}-fine-tuned",
        dataset=store.dataset,
        manifest=store.manifest,
        classes=store.classes,
        config=config,
        members=[Member(config, record_features(data.stored, data.specs), head.eval(), 1.0)],
        thresholds=final_thresholds(data, config, held_out),
        histories=[history],
        held_out=held_out,
        split_digest=split_digest(store),
    )
    run.results = compute_results(data, run, lambda member: table)
    run.seconds = time.perf_counter() - begun
    return run
