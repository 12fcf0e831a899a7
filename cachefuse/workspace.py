"""The paths in a workspace, the folder that commands share."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WorkspacePaths:
    """The paths in a workspace: raw data, feature stores, runs."""

    root: Path = Path("workspace")

    def data(self, dataset: str) -> Path:
        return self.root / "data" / dataset

    def store(self, dataset: str) -> Path:
        return self.root / "cache" / f"{dataset}.zarr"

    @property
    def stores(self) -> list[Path]:
        return sorted((self.root / "cache").glob("*.zarr"))

    @property
    def runs(self) -> Path:
        return self.root / "runs"
