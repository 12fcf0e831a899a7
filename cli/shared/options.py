"""Options of several commands."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachefuse.printable import listed

if TYPE_CHECKING:
    from cachefuse.data.dataset import Dataset
    from cachefuse.data.manifest import Manifest
    from cachefuse.store.store import FeatureStore
    from cachefuse.workspace import WorkspacePaths

logger = logging.getLogger("cachefuse.cli")


Workspace = Annotated[
    Path,
    typer.Option("--workspace", envvar="CACHEFUSE_WORKSPACE", metavar="DIR", help="The folder of stores and runs."),
]
WORKSPACE = Path("workspace")
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", metavar="DIR", help="The folder of the raw data.", show_default="<workspace>/data/<dataset>"
    ),
]
DatasetName = Annotated[
    str, typer.Option("--dataset", metavar="NAME", help="A built-in dataset, or a manifest such as ./mine.toml.")
]
StoreName = Annotated[
    str | None,
    typer.Option(
        "--dataset", metavar="NAME", help="The dataset of the features.", show_default="the one extracted last"
    ),
]
UsedEncoders = Annotated[
    list[str] | None,
    typer.Option(
        "--encoder", metavar="SPEC", help="The encoder of the features; repeatable.", show_default="all in the store"
    ),
]
Views = Annotated[
    str,
    typer.Option(
        "--views",
        metavar="LIST",
        help="pooled, tokens, ids (the numbers of a text's tokens), or several: pooled,tokens. lexical has its own.",
    ),
]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", metavar="N", help="Samples per batch.", show_default="32, on CUDA 256")
]
Dtype = Annotated[
    str, typer.Option("--dtype", metavar="NAME", help="float16, float32, or int8 for tokens; ids are int32.")
]
Limit = Annotated[
    int | None, typer.Option("--limit", metavar="N", min=1, help="Use only N samples, in a separate store.")
]
Encoders = Annotated[
    list[str] | None,
    typer.Option("--encoder", metavar="SPEC", help=r"family:model\[@weights]\[,option=value ...]; repeatable."),
]
NoLexical = Annotated[
    bool,
    typer.Option(
        "--no-lexical", help="Leave out the n-grams of texts (encoder lexical), added where a head reads them."
    ),
]
Pooling = Annotated[
    str | None,
    typer.Option(
        "--pooling",
        metavar="NAME",
        help="Pooled features of hf: encoders: cls, mean, pooler or last.",
        show_default="the model's own",
    ),
]
MaxTokens = Annotated[
    str | None,
    typer.Option("--max-tokens", metavar="N", help="Cut texts to N tokens.", show_default="the model's limit"),
]
LongTexts = Annotated[
    str | None,
    typer.Option(
        "--long-texts",
        metavar="NAME",
        help="cut, or windows: the mean over windows of the whole text.",
        show_default="cut",
    ),
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
        help="Number of CPU threads.",
        show_default="as many as there are idle cores",
    ),
]  # the callback sets it for the whole process: commands need not use it
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
    """Split an option's names at the commas."""
    return tuple(name.strip() for name in text.split(","))


def encoder_options(pooling: str | None, max_tokens: str | None, long_texts: str | None) -> dict[str, str]:
    """Return the options for all encoders of a command that have them."""
    options = {"pooling": pooling, "max_tokens": max_tokens, "long_texts": long_texts}
    return {name: value for name, value in options.items() if value is not None}


def encoder_spec(spec: str, workspace: Path) -> str:
    """Return an encoder spec; in ``aligned:NAME``, replace the name by the path of that run in the workspace."""
    family, _, name = spec.partition(":")
    run = workspace / "runs" / name.partition("@")[0]
    return f"{family}:{workspace / 'runs' / name}" if family == "aligned" and (run / "run.json").is_file() else spec


def chosen_encoders(given: list[str] | None, dataset: "Dataset", workspace: Path, no_lexical: bool) -> list[str]:
    """Return the specs to extract: those given, or the default. Datasets with a text for a head get lexical too."""
    from cachefuse.encoders import DEFAULT_ENCODER, LEXICAL

    encoders = [encoder_spec(spec, workspace) for spec in given or [DEFAULT_ENCODER]]
    texts = dataset.modalities.get("text")
    has_head = dataset.manifest.task in ("multilabel", "multiclass", "multitask")
    wanted = has_head and texts is not None and texts.is_text and texts.offsets is None
    return [*encoders, LEXICAL] if wanted and not no_lexical else encoders


def open_store(workspace: Path, dataset: str | None) -> "FeatureStore":
    """Open a dataset's store, by default the one extracted last."""
    from cachefuse.data.dataset import dataset_options
    from cachefuse.errors import CacheError
    from cachefuse.store.store import FeatureStore
    from cachefuse.workspace import WorkspacePaths

    paths = WorkspacePaths(workspace)
    if dataset is not None:
        name = dataset_name(dataset)
        if not paths.store(name).exists():
            known = listed(path.stem for path in paths.stores) or "no dataset yet"
            raise CacheError(
                f"no features of {name} in {workspace}; make them with cachefuse extract {dataset_options(dataset)} "
                f"(it has features of: {known})"
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
    """Read a dataset by its name or its manifest's file, and print its name."""
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


def find_dataset(path: str) -> tuple[str, Path | None]:
    """Return the name or manifest of the dataset at a path, and the folder of its data if that is known.

    The path is a manifest, a folder with one, or a built-in dataset's folder of the dataset's name. Raises
    ManifestError for another one.
    """
    from cachefuse.data.manifest import load_manifest
    from cachefuse.errors import ManifestError, UnknownNameError

    folder = Path(path)
    if not folder.is_dir():
        load_manifest(path if folder.is_absolute() or path.endswith(".toml") else f"./{path}")
        return path, None
    match sorted(folder.glob("*.toml")):
        case [manifest]:
            load_manifest(str(manifest))
            return str(manifest), None
        case []:
            name = folder.resolve().name
            try:
                load_manifest(name)
            except UnknownNameError:
                raise ManifestError(f"{path}: has no manifest (*.toml); write one, or name its file") from None
            return name, folder
        case several:
            raise ManifestError(f"{path}: has {listed(file.name for file in several)}; name the file of one manifest")


def reopen_dataset(store: "FeatureStore", name: str | None, workspace: Path, data_dir: Path | None) -> "Dataset":
    """Read the dataset of a store; the raw data may be beside a manifest's file."""
    from cachefuse.data.dataset import load_dataset
    from cachefuse.data.manifest import load_manifest
    from cachefuse.workspace import WorkspacePaths

    manifest, folder = load_manifest(name) if name and name.endswith(".toml") else (store.manifest, None)
    dataset = load_dataset(manifest, data_root(WorkspacePaths(workspace), manifest, folder, data_dir))
    limited = store.dataset.removeprefix(f"{manifest.name}-limit")
    return dataset.limit(int(limited)) if limited.isdigit() else dataset


def dataset_name(dataset: str) -> str:
    """Return the name of a dataset, given by its name or its manifest's file."""
    if not dataset.endswith(".toml"):
        return dataset
    from cachefuse.data.manifest import load_manifest

    return load_manifest(dataset)[0].name


def data_root(paths: "WorkspacePaths", manifest: "Manifest", folder: Path | None, data_dir: Path | None) -> Path:
    """Return the folder of the raw data: --data-dir, else the manifest's folder if it has data, else the workspace."""
    if data_dir is not None:
        return data_dir
    if folder is not None and not manifest.open_reader().missing(folder):
        return folder
    return paths.data(manifest.name) if folder is None or paths.data(manifest.name).exists() else folder
