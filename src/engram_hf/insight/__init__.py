"""What one looks at: curves of a run."""
