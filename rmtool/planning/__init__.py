"""From a recipe to steps, memory and time, before anything is trained."""
