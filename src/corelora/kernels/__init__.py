"""The adapter's path, fast: one function, one reference, and the choice between them.

y = W x + b + [L | W[:, cols]] G [R ; W[rows, :]] x            (form.py builds R, L, G from any adapter)
"""
