"""Ready configurations (YAML, DeepSpeed JSON)."""
