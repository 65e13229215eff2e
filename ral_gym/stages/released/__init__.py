"""Released checkpoints of other projects: reading without running what is in them, and importing as runs."""
