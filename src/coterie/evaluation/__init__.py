"""Suites of tasks, metrics and comparisons of the ways to combine experts."""
