"""Questions asked of this machine, and their answers as tables: what ``undercroft bench`` runs."""
