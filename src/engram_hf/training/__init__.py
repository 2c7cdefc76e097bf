"""What changes a model in training: callbacks for the stock Trainer."""
