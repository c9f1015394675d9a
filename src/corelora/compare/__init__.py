"""Studies: many runs around one recipe, from a file to a report."""
