from pathlib import Path

from cachefuse.workspace import WorkspacePaths


def test_workspace_paths(tmp_path):
    workspace = WorkspacePaths(tmp_path)
    assert workspace.data("mine") == tmp_path / "data/mine"
    assert workspace.store("mine") == tmp_path / "cache/mine.zarr"
    assert workspace.runs == tmp_path / "runs"
    assert workspace.stores == []
    assert list(tmp_path.iterdir()) == []
    for name in ("b", "a"):
        workspace.store(name).mkdir(parents=True)
    assert workspace.stores == [workspace.store("a"), workspace.store("b")]
    assert WorkspacePaths().root == Path("workspace")
