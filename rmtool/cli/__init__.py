"""The commands: one file each, with its options, its examples and its body."""
