"""Combining experts into one dense model."""
