"""Outcomes as DICOM objects: Structured Report and Secondary Capture, and the checks before one may leave."""

from dicom_node.report.context import Predecessor, RenderedResult, RenderError, ReportContext
from dicom_node.report.fallback import derive
from dicom_node.report.fallback_gate import check_fallback
from dicom_node.report.gate import check
from dicom_node.report.identity import adopted
from dicom_node.report.rendering import render
from dicom_node.report.uids import NODE_NAMESPACE, OFFLINE_NAMESPACE

__all__ = [
    "NODE_NAMESPACE",
    "OFFLINE_NAMESPACE",
    "Predecessor",
    "RenderError",
    "RenderedResult",
    "ReportContext",
    "adopted",
    "check",
    "check_fallback",
    "derive",
    "render",
]
