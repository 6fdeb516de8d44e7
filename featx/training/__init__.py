"""The split at the freeze point, the head, the schedule, augmented views and the loop."""
