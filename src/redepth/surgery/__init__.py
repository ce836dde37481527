"""From a source checkpoint to a recurrent one: families, plan, weights, verification."""
