"""Evaluation: suites, answer readers, code run safely, results."""
