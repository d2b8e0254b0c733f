"""The eval/rm metrics of held-out pairs."""
