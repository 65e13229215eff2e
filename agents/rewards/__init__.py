"""What brings rewards into a rollout."""
