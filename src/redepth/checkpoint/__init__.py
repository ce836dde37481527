"""A checkpoint folder: opened, loaded, written whole, with its records and card."""
