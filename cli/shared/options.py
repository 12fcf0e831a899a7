"""Options that several commands share, under the same words."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cachefuse.data.dataset import Dataset
    from cachefuse.data.manifest import Manifest
    from cachefuse.store.store import FeatureStore
    from cachefuse.workspace import WorkspacePaths

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
DatasetName = Annotated[
    str, typer.Option("--dataset", metavar="NAME", help="A built-in dataset, or a manifest: ./mine.toml.")
]
StoreName = Annotated[
    str | None,
    typer.Option("--dataset", metavar="NAME", help="Whose features.", show_default="the one extracted last"),
]
UsedEncoders = Annotated[
    list[str] | None,
    typer.Option("--encoder", metavar="SPEC", help="Which features; repeatable.", show_default="all in the store"),
]
Views = Annotated[
    str,
    typer.Option(
        "--views",
        metavar="LIST",
        help="pooled, tokens, ids (the numbers of a text's tokens), or several: pooled,tokens.",
    ),
]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", metavar="N", help="Samples at a time.", show_default="32, on CUDA 256")
]
Dtype = Annotated[
    str, typer.Option("--dtype", metavar="NAME", help="float16, float32, or int8 for tokens; ids are int32.")
]
Limit = Annotated[
    int | None, typer.Option("--limit", metavar="N", min=1, help="Only N samples, in a store of their own.")
]
Encoders = Annotated[
    list[str] | None,
    typer.Option("--encoder", metavar="SPEC", help=r"family:model\[@weights]; may be given several times."),
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, ...")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        envvar="CACHEFUSE_THREADS",
        metavar="N",
        min=1,
        max=512,
        callback=lambda n: _set_threads(n),
        help="CPU threads to compute with.",
        show_default="as many as there are idle cores",
    ),
]  # holds for the process: a command need not hand it on
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", help="Same seed, machine, libraries and threads: same result.")
]
RunName = Annotated[
    str | None, typer.Option("--run", metavar="NAME", help="A run's name or folder.", show_default="the latest")
]


def _set_threads(n: int | None) -> None:
    from cachefuse.threads import set_threads

    set_threads(n)


def split_list(text: str) -> tuple[str, ...]:
    """Return the parts of an option that lists names with commas."""
    return tuple(part.strip() for part in text.split(","))


def resolve_encoder(spec: str, workspace: Path) -> str:
    """Return a spec with ``aligned:NAME`` as the run of that name in the workspace."""
    family, _, name = spec.partition(":")
    run = workspace / "runs" / name.partition("@")[0]
    return f"{family}:{workspace / 'runs' / name}" if family == "aligned" and (run / "run.json").is_file() else spec


def open_store(workspace: Path, dataset: str | None) -> "FeatureStore":
    """Open a dataset's store, by default the one that extract last worked on."""
    from cachefuse.errors import CacheError
    from cachefuse.store.store import FeatureStore
    from cachefuse.workspace import WorkspacePaths

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
            logger.warning("skipped: %s", error)
    if not stores:
        raise CacheError(f"no features in {workspace} yet; start with cachefuse extract --dataset NAME")
    return max(stores, key=lambda store: store.extracted)


def open_dataset(name: str, workspace: Path, data_dir: Path | None, limit: int | None = None) -> "Dataset":
    """Read a dataset by its name or its manifest's file, and say which it is."""
    from cachefuse_cli.shared import render

    with render.status("reading the dataset"):
        from cachefuse.data.dataset import load_dataset
        from cachefuse.data.manifest import load_manifest
        from cachefuse.workspace import WorkspacePaths

        manifest, folder = load_manifest(name)
        dataset = load_dataset(manifest, data_root(WorkspacePaths(workspace), manifest, folder, data_dir))
        if limit is not None:
            dataset = dataset.limit(limit)
    render.dataset_line(dataset)
    return dataset


def reopen_dataset(store: "FeatureStore", name: str | None, workspace: Path, data_dir: Path | None) -> "Dataset":
    """Read the dataset that a store was made from; a manifest's file says where its raw data is."""
    from cachefuse.data.dataset import load_dataset
    from cachefuse.data.manifest import load_manifest
    from cachefuse.workspace import WorkspacePaths

    manifest, folder = load_manifest(name) if name and name.endswith(".toml") else (store.manifest, None)
    dataset = load_dataset(manifest, data_root(WorkspacePaths(workspace), manifest, folder, data_dir))
    limited = store.dataset.removeprefix(f"{manifest.name}-limit")
    return dataset.limit(int(limited)) if limited.isdigit() else dataset


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
