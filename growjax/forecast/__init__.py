"""What a plan will cost, and whether it fits: dry run, XLA count, pods, memory, calibration."""
