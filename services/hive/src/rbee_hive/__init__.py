"""The hive: owns one machine, its devices, its model files and its worker processes."""

from importlib.metadata import version

VERSION = version("rbee-hive")
