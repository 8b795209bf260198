"""Models: specification from a checkpoint folder, loading unit by unit, and the two layer implementations."""
