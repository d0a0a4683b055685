"""What networks are trained with: pairs with known correspondence, samplers, losses. Never imported by a run."""
