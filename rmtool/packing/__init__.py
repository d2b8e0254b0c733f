"""Many response groups in one forward pass: layout, attention, and which models support it."""
