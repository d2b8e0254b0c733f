"""A recipe's pairs: which are trained on, in which step; statistics; token cache. No torch."""
