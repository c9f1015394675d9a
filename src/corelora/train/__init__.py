"""Training: a recipe in, a run folder out. `run.train` is the main path."""
