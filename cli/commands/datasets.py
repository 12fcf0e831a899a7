"""`cachefuse datasets`."""

from cachefuse_cli.shared.options import WORKSPACE, DataDir, Json, Workspace


def datasets(workspace: Workspace = WORKSPACE, data_dir: DataDir = None, json: Json = False) -> None:
    """List the built-in datasets: task, size, splits, and whether the workspace has the raw data."""
    from cachefuse.data.manifest import builtin_manifests
    from cachefuse.data.splits import ordered_splits
    from cachefuse.workspace import WorkspacePaths
    from cachefuse_cli.shared import render
    from cachefuse_cli.shared.options import data_root

    paths = WorkspacePaths(workspace)
    rows = []
    for manifest in builtin_manifests():
        root = data_root(paths, manifest, None, data_dir)
        rows.append(
            {
                "name": manifest.name,
                "task": manifest.task,
                "classes": len(manifest.classes or ()) or None,
                "rows": manifest.rows,
                "splits": ordered_splits([*manifest.rows, *manifest.splits]),
                "builtin": manifest.reader["kind"] == "shapes",
                "data": not manifest.open_reader().missing(root),
                "data_dir": str(root),
                "title": manifest.title,
            }
        )
    if json:
        render.print_json(rows)
    else:
        render.datasets(rows)
