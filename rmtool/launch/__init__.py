"""Starts the training processes of one node, watches them, and ends them."""
