"""What a training leaves, and what is done with it."""
