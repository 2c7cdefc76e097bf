"""What runs a model. One flat folder that needs nothing else of the package: it travels to the Hub with the weights."""
