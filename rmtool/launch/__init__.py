"""Training processes: started, watched, ended; which node this is."""
