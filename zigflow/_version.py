"""The one place that holds the release number."""

__version__ = "0.1.0"
