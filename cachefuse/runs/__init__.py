"""Trained runs: their files, and what uses them."""
