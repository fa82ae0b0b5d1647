"""The version of the package, in the one place that both it and its build read."""

__version__ = "0.1.0"
