"""Publishing: upload, model card, errors of the Hub."""
