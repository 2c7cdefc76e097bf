"""What leaves and arrives: verifying and converting checkpoints."""
