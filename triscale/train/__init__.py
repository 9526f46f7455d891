"""Training: optimisers, schedule, weight average, and the one loop."""
