"""A whole node over TLS, set up by the very commands and settings of deploy/README.md: in, out, and stopped."""

import http.client
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset
from pynetdicom import AE

from dicom_node import tls
from dicom_node.settings import TLS
from pipeline.camera import examination, expose
from pipeline.phantom import phantom

PAGE = Path(__file__).parents[3] / "deploy" / "README.md"
VERIFICATION = "1.2.840.10008.1.1"


def documented(language: str) -> str:
    """The block of the page that speaks of certificates."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if "authority.pem" in block]
    return str(block)


def scan(seed: int) -> tuple[Dataset, ...]:
    return expose(phantom(seed, residual=True, stratum="uptake_1_up"), examination(seed), "two_frames")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Certificates of node, camera and archive, as the page makes them, for addresses of this machine."""
    commands = re.sub(r"10\.0\.0\.\d+", "127.0.0.1", documented("sh")).replace(
        "/etc/remnant/tls", str(tmp_path / "tls")
    )
    done = subprocess.run(["bash", "-euc", commands], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return tmp_path / "tls"


def ask(port: int, method: str, path: str, body: object) -> bytes:
    """What Orthanc answers over HTTP; anything but success fails."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as link:
        link.request(method, path, json.dumps(body))
        answer = link.getresponse()
        content = answer.read()
    assert answer.status == 200, content
    return content


def test_a_scan_comes_and_its_results_go_over_tls_and_a_stop_ends_what_is_open(
    folder: Path,
    make_node: Callable[..., Any],
    camera: Callable[..., str],
    start_orthanc: Callable[..., Any],
    wait: Callable[..., Any],
) -> None:
    archive = start_orthanc(
        ae_title="ARCHIVE",
        DicomTlsEnabled=True,
        DicomTlsCertificate=str(folder / "ARCHIVE.pem"),
        DicomTlsPrivateKey=str(folder / "ARCHIVE.key"),
        DicomTlsTrustedCertificates=str(folder / "authority.pem"),
        DicomTlsRemoteCertificateRequired=True,
    )
    node = make_node()
    told = re.sub(r"10\.0\.0\.\d+", "127.0.0.1", documented("toml")).replace("/etc/remnant/tls", str(folder))
    told = told.replace("[tls]", "[tls]\nport = 0").replace("port = 2762", f"port = {archive.dicom_port}")
    node.config.write_text(node.config.read_text() + told + '[[sources]]\nae_title = "ARCHIVE"\n')
    node.start()
    port = int(node.announced("receive")["tls_port"])

    # DCMTK's camera sends, the results go to Orthanc.
    shown = ["+tls", str(folder / "CAMERA1.key"), str(folder / "CAMERA1.pem"), "+cf", str(folder / "authority.pem")]
    camera(port, scan(960), *shown, calling="CAMERA1")
    (row,) = node.wait_for_rows(1, ("delivered",))
    assert len(archive.find(row["study_instance_uid"])) == 2

    # Orthanc sends too: what it has is what we made, so that nothing new starts.
    called = {"AET": "REMNANT", "Host": "127.0.0.1", "Port": port, "UseDicomTls": True}
    ask(archive.http_port, "PUT", "/modalities/node", called)
    sent = ask(archive.http_port, "POST", "/modalities/node/store", archive.find(row["study_instance_uid"]))
    assert json.loads(sent)["FailedInstancesCount"] == 0

    # Stopped with associations open: they are aborted within the encryption, and everything ends in order.
    files = TLS(
        certificate=str(folder / "CAMERA1.pem"),
        key=str(folder / "CAMERA1.key"),
        authorities=str(folder / "authority.pem"),
    )
    ae = AE(ae_title="CAMERA1")
    ae.add_requested_context(VERIFICATION)
    encrypted = (tls.client_context(files), "127.0.0.1")
    open_ones = [ae.associate("127.0.0.1", port, ae_title="REMNANT", tls_args=encrypted) for _ in range(5)]
    assert all(assoc.is_established for assoc in open_ones)
    process = node.processes["serve"]
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert time.monotonic() - began < 15
    wait(lambda: all(assoc.is_aborted for assoc in open_ones), "associations aborted", 10)
