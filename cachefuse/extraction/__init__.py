"""Stage 1: from a dataset to a store."""
