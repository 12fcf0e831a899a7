"""Runs and alignments as HTML pages."""
