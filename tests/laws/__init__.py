"""The laws of the algebra: one table of cases, and what must hold for each of them."""
