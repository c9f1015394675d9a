"""The quick start: a real language model before and after a recipe, on held-out word problems."""
