"""Preference data: rows from files and the Hub (`rows`), their shapes (`formats`), their token ids (`encode`)."""
