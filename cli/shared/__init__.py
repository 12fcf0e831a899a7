"""What several commands need: options, tables, progress, messages."""
