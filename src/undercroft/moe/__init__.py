"""Mixture-of-Experts models larger than memory: experts streamed, in mixed precision where that is allowed."""
