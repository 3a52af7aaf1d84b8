"""A layer's experts: deltas, their factorisation, and the stacked bank that runs them."""
