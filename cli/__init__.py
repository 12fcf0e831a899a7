"""The command line. One file a command; render.py holds all of Rich."""
