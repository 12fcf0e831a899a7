"""A dataset as data: manifests, readers, targets, splits."""
