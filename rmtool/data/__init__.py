"""Files and Hub datasets to preference records. No torch."""
