"""CRaFT: fine-tune a vision-language-action policy and keep what it could do before."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("craft-vla")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"
