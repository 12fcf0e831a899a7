"""The command line. One file a command; render.py and progress.py hold all of Rich."""
