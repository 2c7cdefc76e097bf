"""Local checkpoints: inspect, verify, merge and quantize a folder."""
