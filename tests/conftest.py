"""Settings of the whole suite, and what all its parts need: programs that are not ours, and certificates."""

import dataclasses
import functools
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pydicom.config
import pytest

pydicom.config.INVALID_KEYWORD_BEHAVIOR = "RAISE"


@pytest.fixture(scope="session")
def peer() -> Callable[[str], Path]:
    """Find a real program by name or path; missing is a failure in CI and a skip, with its name, elsewhere.

    Judges that come from PyPI lie beside the interpreter. DCMTK's programs are asked for by full path, because
    pynetdicom puts others of the same names there.
    """

    def find(program: str) -> Path:
        found = shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))
        if found is None:
            message = (
                f"{program} is not installed: `make peers` (dcmtk, orthanc, postgresql, sqlite3, chromium, rsyslog)"
            )
            if os.environ.get("CI"):
                pytest.fail(message)
            pytest.skip(message)
        return Path(found)

    return find


@dataclass(frozen=True)
class Pair:
    """Files of a certificate, its key, and the authority that signed it; PEM, readable by us alone."""

    certificate: Path
    key: Path
    authority: Path


class Authority:
    """Signs certificates into a folder; nothing of it outlives the test."""

    def __init__(self, folder: Path, name: str = "Test authority", above: "Authority | None" = None) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._key = _new_key("ec")
        self.file = folder / f"{name.replace(' ', '-')}.pem"
        issuer, issuer_key = (above._certificate, above._key) if above else (None, self._key)
        self._certificate = _signed(name, self._key, issuer, issuer_key, authority=True)
        _write(self.file, self._certificate)

    def sign(self, name: str, *, kind: str = "ec", **how: Any) -> Pair:
        """Make a pair for a common name. kind: "ec", "rsa" or "weak"; for `how` see `_signed`."""
        key = _new_key(kind)
        stem = self._folder / f"{name}-{len(list(self._folder.iterdir()))}"
        pair = Pair(stem.with_suffix(".pem"), stem.with_suffix(".key"), self.file)
        _write(pair.certificate, _signed(name, key, self._certificate, self._key, **how))
        _write(pair.key, key)
        return pair


def _new_key(kind: str) -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    if kind == "ec":
        return ec.generate_private_key(ec.SECP256R1())
    return rsa.generate_private_key(65537, 1024 if kind == "weak" else 2048)


def _signed(
    name: str,
    key: Any,
    issuer: Any,
    issuer_key: Any,
    *,
    authority: bool = False,
    days: tuple[float, float] = (-1, 90),
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost"),
    uses: tuple[str, ...] = ("SERVER_AUTH", "CLIENT_AUTH"),
) -> Any:
    """Return a certificate, valid from and until so many days from now."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if not authority:
        names = [
            x509.IPAddress(ip_address(host)) if host[0].isdigit() else x509.DNSName(host) for host in hosts if host
        ]
        oids = [getattr(x509.ExtendedKeyUsageOID, use) for use in uses]
        builder = builder.add_extension(x509.ExtendedKeyUsage(oids), critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _write(path: Path, what: Any) -> None:
    from cryptography.hazmat.primitives import serialization as form

    if hasattr(what, "private_bytes"):
        data = what.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    else:
        data = what.public_bytes(form.Encoding.PEM)
    path.write_bytes(data)
    path.chmod(0o600)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that both ends know."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that nobody knows."""
    return Authority(tmp_path_factory.mktemp("stranger"), "Unknown authority")


@pytest.fixture(scope="session")
def untrained_record() -> Callable[..., Any]:
    """A weights record of random numbers, called so, for tests of the way and not of the answer; fields by keyword."""
    from models import weights  # torch: only for tests that ask

    record = weights.WeightsRecord(
        schema=weights.SCHEMA,
        name="untrained-test-fixture",
        version="0",
        file="untrained.safetensors",
        sha256="0" * 64,
        architecture="squeezenet1_1",
        preprocessing="native",
        preprocessing_version="2",
        input=weights.InputFormat(224, 255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        threshold=0.5,
        operating_point="none; random numbers",
        undetermined_band=None,
        temperature=None,
        fusion="mean_logit",
        release="demonstration",
        data="none; random numbers for tests of the software",
        trained_on="nothing",
        training_range=weights.TrainingRange((1.0, 2.5), (500.0, 1e6), None),
        metrics={},
        intended_use="tests of the software",
        acceptance=None,
    )
    return functools.partial(dataclasses.replace, record)
