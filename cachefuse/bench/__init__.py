"""Measure speed and memory on this machine."""
