"""The version, apart from the package that imports everything."""

__version__ = "0.1.0"
