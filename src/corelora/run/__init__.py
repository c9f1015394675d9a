"""What a user runs: models found on this machine, and the quick start."""
