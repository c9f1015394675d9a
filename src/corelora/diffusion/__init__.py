"""Diffusion models: a subject learned from a handful of pictures (DreamBooth), and its adapter for other software."""
