"""Training: from an experiment's config to a checkpoint."""
