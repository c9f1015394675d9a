"""Pictures: reading and checking them, sets of them, shots, tensors, and models that come from PyPI."""
