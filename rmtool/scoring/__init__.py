"""A reward for every response of a file."""
