"""A page to feel depth: text shaded by the steps that each token took."""
