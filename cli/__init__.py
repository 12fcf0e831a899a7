"""The command line: one file per command; only ``shared`` uses Rich."""
