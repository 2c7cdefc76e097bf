"""The `engram-hf` command: thin, over functions that are public in Python too."""
