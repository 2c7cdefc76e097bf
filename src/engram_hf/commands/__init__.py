"""What the `engram-hf` command prints. Its options and help are in `engram_hf_command`, which imports this late."""
