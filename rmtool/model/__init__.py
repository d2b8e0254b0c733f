"""The reward model: from response groups to rewards and losses."""
