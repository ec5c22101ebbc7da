"""The core: the only code that moves tensor bytes between tiers."""
