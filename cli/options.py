"""Options that several commands share, under the same words."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cachefuse.cache.store import FeatureStore
    from cachefuse.data.manifest import Manifest
    from cachefuse.runtime import Workspace as WorkspacePaths

logger = logging.getLogger("cachefuse.cli")

Workspace = Annotated[
    Path,
    typer.Option("--workspace", envvar="CACHEFUSE_WORKSPACE", metavar="DIR", help="Where stores and runs are kept."),
]
WORKSPACE = Path("workspace")
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="DIR", help="The raw data.", show_default="<workspace>/data/<dataset>"),
]
Encoders = Annotated[
    list[str] | None,
    typer.Option("--encoder", metavar="SPEC", help="family:model[@weights]; may be given several times."),
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Same seed, same machine: same result.")]
RunName = Annotated[
    str | None, typer.Option("--run", metavar="NAME", help="A run's name or folder.", show_default="the latest")
]


def open_store(workspace: Path, dataset: str | None) -> "FeatureStore":
    """Open a dataset's store, by default the one that extract last worked on."""
    from cachefuse.cache.store import FeatureStore
    from cachefuse.errors import CacheError
    from cachefuse.runtime import Workspace as WorkspacePaths

    paths = WorkspacePaths(workspace)
    if dataset is not None:
        name = dataset_name(dataset)
        if not paths.store(name).exists():
            known = ", ".join(path.stem for path in paths.stores) or "none yet"
            raise CacheError(
                f"no features of {name} in {workspace}; make them with cachefuse extract --dataset {dataset} "
                f"(extracted here: {known})"
            )
        return FeatureStore(paths.store(name))
    stores = []
    for path in paths.stores:
        try:
            stores.append(FeatureStore(path))
        except CacheError as error:
            logger.warning("passed over: %s", error)
    if not stores:
        raise CacheError(f"no features in {workspace} yet; start with cachefuse extract --dataset NAME")
    return max(stores, key=lambda store: store.extracted)


def dataset_name(dataset: str) -> str:
    """Return the name of a dataset that is given by name or by its manifest's file."""
    if not dataset.endswith(".toml"):
        return dataset
    from cachefuse.data.manifest import load_manifest

    return load_manifest(dataset)[0].name


def data_root(paths: "WorkspacePaths", manifest: "Manifest", folder: Path | None, data_dir: Path | None) -> Path:
    """Return where the raw data is: --data-dir, else beside a manifest file if it is there, else the workspace."""
    if data_dir is not None:
        return data_dir
    if folder is not None and not manifest.open_reader().missing(folder):
        return folder
    return paths.data(manifest.name) if folder is None or paths.data(manifest.name).exists() else folder
