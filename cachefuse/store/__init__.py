"""The format on disk, and reading it."""
