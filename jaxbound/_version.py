"""The version, which is also written into files of results: another one may bound otherwise."""

__version__ = "0.2.0.dev0"
