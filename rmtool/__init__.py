"""rmtool: train and evaluate reward models, score responses, and publish checkpoints.

Public: the command line, the keys of recipes, the files of a run folder, and from Python `rmtool.recipe.load_recipe`,
`rmtool.model.loading.load_for_inference` and `rmtool.model.rewards.compute_rewards`. Everything else may change.
Cost: importing this package imports nothing else; torch and transformers are imported by the modules that use them.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
