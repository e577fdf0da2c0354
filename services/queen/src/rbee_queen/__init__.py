"""The queen: takes requests and decides where they run."""

from importlib.metadata import version

VERSION = version("rbee-queen")
