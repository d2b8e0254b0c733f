"""Records to token ids, grouped by prompt and planned into packs. No torch."""
