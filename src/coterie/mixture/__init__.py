"""The mixture layer, putting it into a model, and loading and saving mixtures."""
