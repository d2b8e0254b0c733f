"""Commands: one module each, with its options and its body."""
