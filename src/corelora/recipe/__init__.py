"""Recipes: one typed tree from data to adapter, read from YAML and checked whole before anything is loaded."""

from corelora.recipe.schema import Recipe
from corelora.recipe.tree import load_recipe, read_tree

__all__ = ["Recipe", "load_recipe", "read_tree"]
