"""cachefuse: encode images and texts once with frozen encoders, then train fusion heads over the cache in minutes.

    dataset = cachefuse.load_dataset(cachefuse.load_manifest("shapes")[0], Path("data"))
    cachefuse.extract(dataset, ["classic"], Path("shapes.zarr"))
    run = cachefuse.train_head(cachefuse.FeatureStore(Path("shapes.zarr")), cachefuse.TrainConfig(fusion="sum"))

Names are imported when they are first used, so that importing cachefuse costs nothing.
"""

from typing import TYPE_CHECKING, Any

from cachefuse.registry import import_entry

if TYPE_CHECKING:
    from cachefuse.alignment.config import AlignConfig
    from cachefuse.alignment.finetune import fine_tune
    from cachefuse.alignment.pairs import mine_pairs, write_pairs
    from cachefuse.alignment.retrieve import retrieve
    from cachefuse.alignment.run import Alignment, list_alignments
    from cachefuse.alignment.similarity import similarity
    from cachefuse.alignment.space import AlignedSpace, EncoderSpace
    from cachefuse.alignment.train import align, evaluate_alignment
    from cachefuse.alignment.zero_shot import zero_shot
    from cachefuse.bench.align import bench_align
    from cachefuse.bench.quality import bench_quality
    from cachefuse.bench.store import bench_store
    from cachefuse.bench.train import bench_train
    from cachefuse.classifier import FusionClassifier
    from cachefuse.data.column import Column
    from cachefuse.data.dataset import Dataset, load_dataset
    from cachefuse.data.manifest import Manifest, builtin_manifests, load_manifest
    from cachefuse.encoders import open_encoder
    from cachefuse.experiments.auto import auto
    from cachefuse.experiments.settings import grid
    from cachefuse.experiments.sweep import sweep
    from cachefuse.extraction.extract import extract
    from cachefuse.extraction.plan import plan
    from cachefuse.extraction.verify import repair, verify
    from cachefuse.report.alignment_page import write_alignment_report
    from cachefuse.report.run_page import report_html, write_report
    from cachefuse.runs.against import RunComparison, evaluate_against, write_differences
    from cachefuse.runs.ensemble import ensemble
    from cachefuse.runs.evaluate import Evaluation, evaluate, write_gates
    from cachefuse.runs.files import find_run, list_runs
    from cachefuse.runs.predict import Predictions, predict_samples, predict_split, read_input
    from cachefuse.runs.run import Run
    from cachefuse.runs.save import load_run, save_run
    from cachefuse.runs.scores import write_scores
    from cachefuse.runs.submission import write_submission
    from cachefuse.runs.train import train_head
    from cachefuse.store.features import Features
    from cachefuse.store.inspect import inspect_store
    from cachefuse.store.store import FeatureStore
    from cachefuse.threads import set_threads
    from cachefuse.training.config import TrainConfig
    from cachefuse.training.duplicates import Duplicates, find_duplicates
    from cachefuse.training.feature_set import FeatureSet, FeatureView, open_features

__version__: str  # of the installed package, read when it is asked for: see __getattr__

_API = {
    "AlignConfig": "cachefuse.alignment.config:AlignConfig",
    "AlignedSpace": "cachefuse.alignment.space:AlignedSpace",
    "Alignment": "cachefuse.alignment.run:Alignment",
    "Column": "cachefuse.data.column:Column",
    "Dataset": "cachefuse.data.dataset:Dataset",
    "Duplicates": "cachefuse.training.duplicates:Duplicates",
    "EncoderSpace": "cachefuse.alignment.space:EncoderSpace",
    "Evaluation": "cachefuse.runs.evaluate:Evaluation",
    "FeatureSet": "cachefuse.training.feature_set:FeatureSet",
    "FeatureStore": "cachefuse.store.store:FeatureStore",
    "FeatureView": "cachefuse.training.feature_set:FeatureView",
    "Features": "cachefuse.store.features:Features",
    "FusionClassifier": "cachefuse.classifier:FusionClassifier",
    "Manifest": "cachefuse.data.manifest:Manifest",
    "Predictions": "cachefuse.runs.predict:Predictions",
    "Run": "cachefuse.runs.run:Run",
    "RunComparison": "cachefuse.runs.against:RunComparison",
    "TrainConfig": "cachefuse.training.config:TrainConfig",
    "align": "cachefuse.alignment.train:align",
    "auto": "cachefuse.experiments.auto:auto",
    "bench_align": "cachefuse.bench.align:bench_align",
    "bench_quality": "cachefuse.bench.quality:bench_quality",
    "bench_store": "cachefuse.bench.store:bench_store",
    "bench_train": "cachefuse.bench.train:bench_train",
    "builtin_manifests": "cachefuse.data.manifest:builtin_manifests",
    "ensemble": "cachefuse.runs.ensemble:ensemble",
    "evaluate": "cachefuse.runs.evaluate:evaluate",
    "evaluate_against": "cachefuse.runs.against:evaluate_against",
    "evaluate_alignment": "cachefuse.alignment.train:evaluate_alignment",
    "extract": "cachefuse.extraction.extract:extract",
    "find_duplicates": "cachefuse.training.duplicates:find_duplicates",
    "find_run": "cachefuse.runs.files:find_run",
    "fine_tune": "cachefuse.alignment.finetune:fine_tune",
    "grid": "cachefuse.experiments.settings:grid",
    "inspect_store": "cachefuse.store.inspect:inspect_store",
    "list_alignments": "cachefuse.alignment.run:list_alignments",
    "list_runs": "cachefuse.runs.files:list_runs",
    "load_dataset": "cachefuse.data.dataset:load_dataset",
    "load_run": "cachefuse.runs.save:load_run",
    "load_manifest": "cachefuse.data.manifest:load_manifest",
    "mine_pairs": "cachefuse.alignment.pairs:mine_pairs",
    "open_encoder": "cachefuse.encoders:open_encoder",
    "open_features": "cachefuse.training.feature_set:open_features",
    "plan": "cachefuse.extraction.plan:plan",
    "predict_samples": "cachefuse.runs.predict:predict_samples",
    "predict_split": "cachefuse.runs.predict:predict_split",
    "read_input": "cachefuse.runs.predict:read_input",
    "repair": "cachefuse.extraction.verify:repair",
    "report_html": "cachefuse.report.run_page:report_html",
    "retrieve": "cachefuse.alignment.retrieve:retrieve",
    "save_run": "cachefuse.runs.save:save_run",
    "set_threads": "cachefuse.threads:set_threads",
    "similarity": "cachefuse.alignment.similarity:similarity",
    "sweep": "cachefuse.experiments.sweep:sweep",
    "train_head": "cachefuse.runs.train:train_head",
    "verify": "cachefuse.extraction.verify:verify",
    "write_alignment_report": "cachefuse.report.alignment_page:write_alignment_report",
    "write_differences": "cachefuse.runs.against:write_differences",
    "write_gates": "cachefuse.runs.evaluate:write_gates",
    "write_pairs": "cachefuse.alignment.pairs:write_pairs",
    "write_report": "cachefuse.report.run_page:write_report",
    "write_scores": "cachefuse.runs.scores:write_scores",
    "write_submission": "cachefuse.runs.submission:write_submission",
    "zero_shot": "cachefuse.alignment.zero_shot:zero_shot",
}
__all__ = [
    "AlignConfig",
    "AlignedSpace",
    "Alignment",
    "Column",
    "Dataset",
    "Duplicates",
    "EncoderSpace",
    "Evaluation",
    "FeatureSet",
    "FeatureStore",
    "FeatureView",
    "Features",
    "FusionClassifier",
    "Manifest",
    "Predictions",
    "Run",
    "RunComparison",
    "TrainConfig",
    "align",
    "auto",
    "bench_align",
    "bench_quality",
    "bench_store",
    "bench_train",
    "builtin_manifests",
    "ensemble",
    "evaluate",
    "evaluate_against",
    "evaluate_alignment",
    "extract",
    "find_duplicates",
    "find_run",
    "fine_tune",
    "grid",
    "inspect_store",
    "list_alignments",
    "list_runs",
    "load_dataset",
    "load_manifest",
    "load_run",
    "mine_pairs",
    "open_encoder",
    "open_features",
    "plan",
    "predict_samples",
    "predict_split",
    "read_input",
    "repair",
    "report_html",
    "retrieve",
    "save_run",
    "set_threads",
    "similarity",
    "sweep",
    "train_head",
    "verify",
    "write_alignment_report",
    "write_differences",
    "write_gates",
    "write_pairs",
    "write_report",
    "write_scores",
    "write_submission",
    "zero_shot",
]


def __getattr__(name: str) -> Any:
    if name in _API:
        return import_entry(_API[name])
    if name == "__version__":
        from importlib.metadata import version  # takes a while

        return version("cachefuse")
    raise AttributeError(f"module 'cachefuse' has no attribute {name!r}")
