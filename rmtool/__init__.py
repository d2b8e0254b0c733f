"""rmtool: train, evaluate, score with and publish reward models.

Importing this package costs nothing: torch and transformers are imported by the modules that compute with them.
"""

__version__ = "0.1.0"
