"""Stage 1: write a dataset's features to a store."""
