"""Training whose saved activations may leave memory and come back, with the same numbers."""
