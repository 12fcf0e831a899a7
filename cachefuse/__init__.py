"""cachefuse: encode images and texts once with frozen encoders, then train fusion heads over the cache in minutes.

    dataset = cachefuse.load_dataset(cachefuse.load_manifest("shapes")[0], Path("data"))
    cachefuse.extract(dataset, ["classic"], Path("shapes.zarr"))
    run = cachefuse.train_head(cachefuse.FeatureStore(Path("shapes.zarr")), cachefuse.TrainConfig(fusion="sum"))

Names are imported when they are first used, so that importing cachefuse costs nothing.
"""

from typing import TYPE_CHECKING, Any

from cachefuse.registry import resolve

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
    from cachefuse.bench.store import bench_store
    from cachefuse.bench.train import bench_train
    from cachefuse.cache.extract import extract
    from cachefuse.cache.features import Features
    from cachefuse.cache.inspection import inspect_store
    from cachefuse.cache.plan import plan
    from cachefuse.cache.store import FeatureStore
    from cachefuse.cache.verify import repair, verify
    from cachefuse.classifier import FusionClassifier
    from cachefuse.data.dataset import Dataset, load_dataset
    from cachefuse.data.manifest import Manifest, builtin_manifests, load_manifest
    from cachefuse.encoders import open_encoder
    from cachefuse.evaluation import Evaluation, evaluate, write_gates
    from cachefuse.predict import Predictions, predict_samples, predict_split, read_input
    from cachefuse.report.alignment import write_alignment_report
    from cachefuse.report.page import report_html, write_report
    from cachefuse.submission import write_submission
    from cachefuse.threads import set_threads
    from cachefuse.training.config import TrainConfig
    from cachefuse.training.ensemble import ensemble
    from cachefuse.training.feature_set import FeatureSet, FeatureView, open_features
    from cachefuse.training.run import Run
    from cachefuse.training.run_files import find_run, list_runs
    from cachefuse.training.sweep import sweep
    from cachefuse.training.sweep_settings import grid
    from cachefuse.training.train import train_head

__version__ = "0.1.0"

_API = {
    "AlignConfig": "cachefuse.alignment.config:AlignConfig",
    "AlignedSpace": "cachefuse.alignment.space:AlignedSpace",
    "Alignment": "cachefuse.alignment.run:Alignment",
    "Dataset": "cachefuse.data.dataset:Dataset",
    "EncoderSpace": "cachefuse.alignment.space:EncoderSpace",
    "Evaluation": "cachefuse.evaluation:Evaluation",
    "FeatureSet": "cachefuse.training.feature_set:FeatureSet",
    "FeatureStore": "cachefuse.cache.store:FeatureStore",
    "FeatureView": "cachefuse.training.feature_set:FeatureView",
    "Features": "cachefuse.cache.features:Features",
    "FusionClassifier": "cachefuse.classifier:FusionClassifier",
    "Manifest": "cachefuse.data.manifest:Manifest",
    "Predictions": "cachefuse.predict:Predictions",
    "Run": "cachefuse.training.run:Run",
    "TrainConfig": "cachefuse.training.config:TrainConfig",
    "align": "cachefuse.alignment.train:align",
    "bench_align": "cachefuse.bench.align:bench_align",
    "bench_store": "cachefuse.bench.store:bench_store",
    "bench_train": "cachefuse.bench.train:bench_train",
    "builtin_manifests": "cachefuse.data.manifest:builtin_manifests",
    "ensemble": "cachefuse.training.ensemble:ensemble",
    "evaluate": "cachefuse.evaluation:evaluate",
    "evaluate_alignment": "cachefuse.alignment.train:evaluate_alignment",
    "extract": "cachefuse.cache.extract:extract",
    "find_run": "cachefuse.training.run_files:find_run",
    "fine_tune": "cachefuse.alignment.finetune:fine_tune",
    "grid": "cachefuse.training.sweep_settings:grid",
    "inspect_store": "cachefuse.cache.inspection:inspect_store",
    "list_alignments": "cachefuse.alignment.run:list_alignments",
    "list_runs": "cachefuse.training.run_files:list_runs",
    "load_dataset": "cachefuse.data.dataset:load_dataset",
    "load_manifest": "cachefuse.data.manifest:load_manifest",
    "mine_pairs": "cachefuse.alignment.pairs:mine_pairs",
    "open_encoder": "cachefuse.encoders:open_encoder",
    "open_features": "cachefuse.training.feature_set:open_features",
    "plan": "cachefuse.cache.plan:plan",
    "predict_samples": "cachefuse.predict:predict_samples",
    "predict_split": "cachefuse.predict:predict_split",
    "read_input": "cachefuse.predict:read_input",
    "repair": "cachefuse.cache.verify:repair",
    "report_html": "cachefuse.report.page:report_html",
    "retrieve": "cachefuse.alignment.retrieve:retrieve",
    "set_threads": "cachefuse.threads:set_threads",
    "similarity": "cachefuse.alignment.similarity:similarity",
    "sweep": "cachefuse.training.sweep:sweep",
    "train_head": "cachefuse.training.train:train_head",
    "verify": "cachefuse.cache.verify:verify",
    "write_alignment_report": "cachefuse.report.alignment:write_alignment_report",
    "write_gates": "cachefuse.evaluation:write_gates",
    "write_pairs": "cachefuse.alignment.pairs:write_pairs",
    "write_report": "cachefuse.report.page:write_report",
    "write_submission": "cachefuse.submission:write_submission",
    "zero_shot": "cachefuse.alignment.zero_shot:zero_shot",
}
__all__ = [
    "AlignConfig",
    "AlignedSpace",
    "Alignment",
    "Dataset",
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
    "TrainConfig",
    "align",
    "bench_align",
    "bench_store",
    "bench_train",
    "builtin_manifests",
    "ensemble",
    "evaluate",
    "evaluate_alignment",
    "extract",
    "find_run",
    "fine_tune",
    "grid",
    "inspect_store",
    "list_alignments",
    "list_runs",
    "load_dataset",
    "load_manifest",
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
    "set_threads",
    "similarity",
    "sweep",
    "train_head",
    "verify",
    "write_alignment_report",
    "write_gates",
    "write_pairs",
    "write_report",
    "write_submission",
    "zero_shot",
]


def __getattr__(name: str) -> Any:
    if name in _API:
        return resolve(_API[name])
    raise AttributeError(f"module 'cachefuse' has no attribute {name!r}")
