"""chatterd: the back end of Chatter."""

from importlib.metadata import version

__version__ = version("chatterd")
