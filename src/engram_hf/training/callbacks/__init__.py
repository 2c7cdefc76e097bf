"""Callbacks for the stock Trainer."""
