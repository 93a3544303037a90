"""Remnant's DICOM node: receiving, worklist, reports, sending. Start reading at `service.py`."""

from importlib.metadata import version

__version__ = version("remnant-node")
