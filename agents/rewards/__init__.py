"""Callbacks and wrappers that write rewards into a rollout."""
