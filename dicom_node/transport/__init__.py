"""The called side of DICOM's upper layer and message exchange (PS3.8, PS3.7), on blocking sockets.

`listen(doors, service)` starts a `Server`. A `Service` says who is admitted, which presentation contexts are taken
and what answers a request; all below that is here: `states` (the standard's table as data), `negotiation`, `dimse`,
`secure` (TLS), `connection` (one peer, one thread, deadlines), `server` (who is connected). It knows neither spool nor
worklist.
"""

from dicom_node.transport.connection import Answer, Draft, Limits, Peer, Refusal, Request, Service
from dicom_node.transport.dimse import C_STORE_RQ, N_ACTION_RQ, N_EVENT_REPORT_RQ
from dicom_node.transport.negotiation import MAXIMUM_PDU_SIZE
from dicom_node.transport.secure import Certificate
from dicom_node.transport.server import Door, Server, listen

__all__ = [
    "C_STORE_RQ",
    "MAXIMUM_PDU_SIZE",
    "N_ACTION_RQ",
    "N_EVENT_REPORT_RQ",
    "Answer",
    "Certificate",
    "Door",
    "Draft",
    "Limits",
    "Peer",
    "Refusal",
    "Request",
    "Server",
    "Service",
    "listen",
]
