"""What several scripts share: text, the small model, tables of any size, memory limits, results. Nothing to run."""
