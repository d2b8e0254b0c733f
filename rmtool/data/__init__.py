"""From files and Hub datasets to preference records. No torch."""
