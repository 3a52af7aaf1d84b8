"""Pictures of a mixture: tables for the terminal."""
