"""Many trainings: sweeps, comparisons, the papers' experiments."""
