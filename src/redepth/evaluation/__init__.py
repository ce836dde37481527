"""What a model is worth at each depth."""
