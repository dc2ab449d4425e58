"""Experiments: each answers one question about jaxbound and runs as `python -m experiments.<name>`."""
