"""Configurations for `experiments.train`: each file has `get_config()`."""
