"""The worker: hosts one engine and speaks the job contract."""

from importlib.metadata import version

VERSION = version("rbee-worker")
