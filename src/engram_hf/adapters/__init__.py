"""What is added to models that are there: LoRA on the backbone."""
