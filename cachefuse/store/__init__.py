"""The store's format on disk, and how to read it."""
