"""The training run that follows a conversion."""
