"""Pooling, score and selection: how a mixture layer decides which experts answer."""
