"""Images or codes -> scores -> a reward per code: critics, distribution rewards, rewards of your own."""
