"""Code of several commands: options, tables, progress, messages."""
