"""Everything that knows transformers: opening checkpoints, text and chat as tokens, causal models."""
