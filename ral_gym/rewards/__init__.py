"""Image or codes -> score: critics, distribution rewards, and what they pay each code."""
