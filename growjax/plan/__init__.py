"""What a run is, as values: the plan, its stages, losses, schedule and optimizer. Computes nothing."""
