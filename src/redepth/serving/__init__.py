"""Many requests at a time, each at its own depth."""
