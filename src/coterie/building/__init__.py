"""Building: from sources to a mixture, one layer at a time."""
