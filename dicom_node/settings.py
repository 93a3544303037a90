"""One frozen settings object from `node.toml` and the environment.

An unknown key, a wrong unit or an unreadable file stops the start with one sentence that names the key
(`SettingsError`). Environment variables override the file: `REMNANT_NODE__PORT=11113`. Every field says its meaning,
its unit and why its default is what it is; `deploy/node.toml` is the same list for an admin, and a test keeps the two
together.
"""

import os
import tomllib
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from dicom_node.errors import SettingsError
from pipeline.finding import ViewName


def _ae_title(value: str) -> str:
    """PS3.5 6.2, VR AE: 1 to 16 characters of the default repertoire, no backslash or control characters."""
    value = value.strip()
    if not 1 <= len(value) <= 16 or not value.isascii() or not value.isprintable() or "\\" in value:
        raise ValueError("an AE title has 1 to 16 printable ASCII characters and no backslash")
    return value


def _address(value: str) -> str:
    try:
        ip_network(value, strict=False)
    except ValueError as error:
        raise ValueError("give an IP address or a network such as 10.0.0.0/24") from error
    return value


def _size(value: object) -> object:
    """Bytes need a unit: "2" could be meant as gigabytes, and a wrong reserve loses scans."""
    if isinstance(value, str) and value.strip().isdigit():
        raise ValueError('give a size with its unit, such as "2 GiB"')
    if isinstance(value, int | float) and not isinstance(value, bool) and value != 0:
        raise ValueError('give a size with its unit, such as "2 GiB"')
    return value


def _says_it_in_words(value: tuple[str, ...]) -> tuple[str, ...]:
    """A mask exists only where tissue was outlined: alone, its absence would be read as "negative"."""
    if not {"sr", "sc"} & set(value):
        raise ValueError('a segmentation needs "sr" or "sc" beside it')
    return value


AETitle = Annotated[str, AfterValidator(_ae_title)]
Address = Annotated[str, AfterValidator(_address)]
Size = Annotated[ByteSize, BeforeValidator(_size)]
Port = Annotated[int, Field(ge=1, le=65535)]
# Port 0 lets the system choose: tests and the demo need it, an installation does not.
ListenPort = Annotated[int, Field(ge=0, le=65535)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Node(_Section):
    """Who and where this node is."""

    ae_title: AETitle = "REMNANT"
    """The AE title peers call us by; also our calling AE title. An association that calls another name is refused."""
    host: str = "0.0.0.0"  # noqa: S104 - the contract's default; without a source we bind to loopback only
    """Address to listen on. Without any [[sources]] the node listens on loopback only, whatever stands here."""
    port: ListenPort = 11112
    """TCP port of the receiver; 11112 is the port registered for DICOM that needs no root."""
    timezone: str = ""
    """IANA zone of ContentDate and ContentTime in results; empty: the system's."""

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        if value:
            try:
                ZoneInfo(value)
            except (ZoneInfoNotFoundError, ValueError) as error:
                raise ValueError(f"unknown time zone {value!r}; use a name such as Europe/Berlin") from error
        return value


class Receiver(_Section):
    """How the receiver treats those who connect."""

    extra_classes: tuple[str, ...] = ()
    """More SOP classes to accept and keep (keyword or UID), for cameras that route what is not on our list."""
    extra_syntaxes: tuple[str, ...] = ()
    """More transfer syntaxes to accept (keyword or UID), such as RLELossless; kept as sent, decoded by the worker."""
    idle_timeout_s: PositiveFloat = 30
    """Seconds without a message before an association is aborted; a camera between two views needs a few."""
    max_associations: PositiveInt = 200
    """Associations at the same time; further ones are rejected as transient, so that the peer tries again."""
    max_associations_per_peer: PositiveInt = 150
    """Of them, for one address or one calling AE title: a device that runs wild leaves room for the others."""
    max_object: Size = ByteSize(256 * 1024**2)
    """Longest object to take, read into memory and refused (C000) beyond; a neck scan has 265 kB, a CT slice 0.5 MB."""


class Storage(_Section):
    """Where the bytes are."""

    directory: Path = Path("var")
    """Folder of spool, quarantine and results; relative to the working directory."""
    min_free: Size = ByteSize(2 * 1024**3)
    """Free space kept in reserve; below it the receiver answers A700 before anything is written. 2 GiB: 8,000 scans."""
    journal: bool = True
    """Make objects that come in a burst durable in a journal of up to 64 MiB, one barrier each, and sync their files
    behind the answer; false: each file by itself before it."""
    retention_days: PositiveInt = 30
    """Days that the bytes of delivered scans and notes stay after the row came to rest."""
    forget_days: PositiveInt = 365
    """Days after which patient and study identity leave the worklist."""


class Database(_Section):
    """Where the facts are."""

    url: str = ""
    """SQLAlchemy URL; empty: SQLite, worklist.db in [storage] directory. Or postgresql+psycopg://..."""
    busy_timeout_s: PositiveFloat = 5
    """Seconds to wait for another writer's lock before A700; an admin's tool seldom holds one longer."""

    @field_validator("url")
    @classmethod
    def _known_database(cls, value: str) -> str:
        if value and not value.startswith(("sqlite:///", "postgresql+psycopg://")):
            raise ValueError("use sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME")
        return value


class Source(_Section):
    """A camera or router that may send to us."""

    ae_title: AETitle
    """Its calling AE title."""
    hosts: tuple[Address, ...] = ()
    """Addresses or networks it may call from; empty: any."""
    certificates: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Over TLS, whose certificate it shows: common or alternative names, or SHA-256 fingerprints; one of them must be
    its own. Empty: the certificate must bear the AE title as a name. Being signed by an authority is not enough."""
    tls: bool = False
    """True: it must call over TLS, and is refused on the plain port."""
    port: Port = 104
    """Its own port, used only to report commitments."""
    commitment: Literal["off", "proxy"] = "off"
    """"proxy": take its Storage Commitment requests and pass them on to the destinations with `storage_commitment`; it
    is told that an object is committed when one of them has committed itself to keep it, and which. Never by ourselves:
    we delete what we receive. Reported to the address it asked from, at `port`, over TLS where `tls` is set."""
    commitment_wait_s: PositiveFloat = 30
    """Seconds for an archive to commit itself; then the camera is told that the object is not committed (0112 where
    every archive says that it does not have it, else 0110), keeps its copy and may ask again. Longer where the archive
    gets the objects later than we do, or reports late."""

    def is_at(self, address: str) -> bool:
        """Say whether it may call from an IP address."""
        at = ip_address(address)
        return not self.hosts or any(at in ip_network(host, strict=False) for host in self.hosts)


class Destination(_Section):
    """An archive that gets our results."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,32}$")]
    """Short name, as it stands in the worklist's `delivered_to`."""
    ae_title: AETitle
    """Its AE title."""
    host: Annotated[str, Field(min_length=1)]
    """Its host name or address."""
    port: Port = 104
    """Its port."""
    results: Annotated[
        tuple[Literal["sr", "sc", "seg", "seg-posterior"], ...], Field(min_length=1), AfterValidator(_says_it_in_words)
    ] = (
        "sr",
        "sc",
    )
    """Which results it gets: Structured Report and Secondary Capture; some viewers list only one of the two. "seg" adds
    the Segmentation of the anterior view where tissue was outlined, "seg-posterior" one that viewers may mirror."""
    sc: Literal["colour", "grey"] = "colour"
    """Secondary Capture in true colour or in grey; some workstations show only one."""
    storage_commitment: bool = False
    """Ask the archive to commit itself to what it stored (Storage Commitment): a result counts as delivered when it
    has. It may report on a new association, and is admitted for that by this AE title and host."""
    query: bool = False
    """Ask the archive whose the study is (C-FIND) before sending to it, and hold back what differs. Off by default:
    not every archive answers queries, and a result waits until it does."""
    test: bool = False
    """True for a test archive: only such a one may get the results of demonstration weights."""
    tls: bool = False
    """Send over TLS, with our certificate, and never in clear: an archive that speaks none gets nothing."""
    authorities: str = ""
    """Over TLS, PEM file of the authorities that may have signed its certificate; empty: `tls.authorities`."""
    server_name: str = ""
    """Over TLS, the name or address that its certificate must bear; empty: `host`."""


class Delivery(_Section):
    """When a delivery that failed is tried again."""

    first_retry_s: PositiveFloat = 30
    """Seconds until the first retry; then doubled."""
    max_retry_s: PositiveFloat = 3600
    """Longest pause between two tries, seconds."""
    give_up_after_days: PositiveFloat = 7
    """Days until a delivery is given up and the row asks for a person; longer than any weekend."""
    timeout_s: PositiveFloat = 30
    """Seconds to wait for a connection, an association or a response of the archive."""


class Analysis(_Section):
    """How scans are analysed."""

    preprocessing: Literal["native", "paper"] = "native"
    """"native": about 0.1 s a view; "paper": the paper's order, 16-22 CPU seconds a view. Must be the weights' own."""
    require_views: Annotated[tuple[ViewName, ...], Field(min_length=1)] = ("anterior", "posterior")
    """Views that a finding needs; a scan without them gets a "not analysed" note."""
    pair_window_s: PositiveFloat = 3600
    """Seconds between the acquisition times of two single-view objects that may be one acquisition."""
    views_timeout_s: PositiveFloat = 3600
    """Seconds to wait for a missing view: a second view may be acquired and sent after the first."""
    timeout_s: PositiveFloat = 60
    """Seconds one analysis may take before its process is ended; "paper" needs 60 on a slow machine."""
    attempts: PositiveInt = 3
    """Ends of the analysis process (crash, time-out, memory) before the scan is `failed`."""
    sensitivity_cps_per_mbq: NonNegativeFloat = 0
    """The camera's calibration for uptake in percent: net counts per second and MBq of a small 131I source of known
    activity in air, within 20 mm of it, at the distance of a neck. 0: not calibrated, and no percentage is given."""


class ModelChoice(_Section):
    """Which weights judge."""

    weights: Annotated[str, Field(min_length=1)] = "remnant-resnet18-phantom"
    """A name in models/cards or the path of a record. The shipped weights are trained on simulated scans only."""


class TLS(_Section):
    """Encryption with certificates on both sides: TLS 1.2 or newer, PS3.15 B.12. Omitted: plain only."""

    port: ListenPort = 2762
    """Port of the encrypted receiver; 2762 is the registered one."""
    certificate: str = ""
    """PEM file of our certificate, and behind it those between it and its authority. Empty: no TLS."""
    key: str = ""
    """PEM file of its key, without a pass phrase; refused where every user of the machine may read it."""
    authorities: str = ""
    """PEM file of the authorities whose certificates we accept; a self-signed certificate stands for itself."""
    plain: bool = True
    """False: there is no plain port, and every source must call over TLS."""

    @property
    def on(self) -> bool:
        """Whether there is TLS."""
        return bool(self.certificate)


class Audit(_Section):
    """Audit messages to a repository: DICOM PS3.15 A.5 over syslog. Omitted: off."""

    host: str = ""
    """Host name or address of the audit record repository. Empty: no audit messages."""
    port: Port = 6514
    """Its port; 6514 is the registered one of syslog over TLS, 601 over TCP, 514 over UDP."""
    transport: Literal["tls", "tcp", "udp"] = "tls"
    """"tls" (RFC 5425), "tcp" (RFC 6587, octet counting) or "udp" (RFC 5426). Messages name patients: the last two go
    to this machine only, as to a relay that runs on it. UDP loses messages and nobody notices."""
    authorities: str = ""
    """PEM file of the authorities that may have signed its certificate; empty: `tls.authorities`."""
    certificate: str = ""
    """PEM file of the certificate we show it; empty: `tls.certificate`."""
    key: str = ""
    """PEM file of that certificate's key; empty: `tls.key`."""
    server_name: str = ""
    """The name or address that its certificate must bear; empty: `host`."""
    source_id: str = ""
    """Who we are in the messages (AuditSourceID); empty: `node.ae_title`."""
    site_id: str = ""
    """The hospital in the messages (AuditEnterpriseSiteID); empty: left out."""
    max_spool: Size = ByteSize(256 * 1024**2)
    """Longest spool while the repository is away; 100,000 to 200,000 messages. Beyond it messages are left out and
    counted, with an alarm: receiving and sending go on."""

    @property
    def on(self) -> bool:
        """Whether there are audit messages."""
        return bool(self.host)


class Web(_Section):
    """The status page. Not built yet; the keys are kept for it."""

    host: str = "127.0.0.1"
    """Address of the status page; loopback, because it has no users of its own."""
    port: ListenPort = 8080
    """Port of the status page."""


class LogSettings(_Section):
    """How the node speaks to its admin."""

    json_lines: Annotated[bool, Field(alias="json")] = False
    """One JSON object a line instead of aligned text."""


class Settings(BaseSettings):
    """Everything a node needs to know. Frozen: a change needs a restart, so that no process sees half of it."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix="REMNANT_", env_nested_delimiter="__", use_attribute_docstrings=True
    )

    node: Node = Node()
    receiver: Receiver = Receiver()
    storage: Storage = Storage()
    database: Database = Database()
    sources: tuple[Source, ...] = ()
    destinations: tuple[Destination, ...] = ()
    delivery: Delivery = Delivery()
    analysis: Analysis = Analysis()
    model: ModelChoice = ModelChoice()
    codes: dict[str, tuple[str, str, str]] = {}
    """A site's own codes for ours: RMN001 = ["1234", "99SITE", "Residual thyroid tissue"]."""
    tls: TLS = TLS()
    audit: Audit = Audit()
    log: LogSettings = LogSettings()
    web: Web = Web()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The file comes in as init arguments; the environment stands above it.
        return env_settings, init_settings

    @field_validator("codes")
    @classmethod
    def _known_codes(cls, value: dict[str, tuple[str, str, str]]) -> dict[str, tuple[str, str, str]]:
        for ours in value:
            if ours not in OUR_CODES:
                raise ValueError(f"{ours} is not a code of ours; ours are {', '.join(OUR_CODES)}")
        return value

    @model_validator(mode="after")
    def _names_differ(self) -> "Settings":
        names = [destination.name for destination in self.destinations]
        if len(set(names)) < len(names):
            raise ValueError("destinations: two of them have the same name")
        return self

    @model_validator(mode="after")
    def _somebody_commits(self) -> "Settings":
        asks = [number for number, source in enumerate(self.sources) if source.commitment == "proxy"]
        if asks and not any(destination.storage_commitment for destination in self.destinations):
            raise ValueError(
                f'sources.{asks[0]} has commitment = "proxy", and no destination with storage_commitment = true could'
                " commit itself"
            )
        return self

    @model_validator(mode="after")
    def _tls_is_whole(self) -> "Settings":
        files = {name: getattr(self.tls, name) for name in ("certificate", "key", "authorities")}
        missing = [f"tls.{name}" for name, path in files.items() if not path]
        if missing and len(missing) < len(files):
            raise ValueError(f"TLS needs {' and '.join(missing)} too")
        if missing and not self.tls.plain:
            raise ValueError("tls.plain = false leaves no port to call; TLS needs tls.certificate, key and authorities")
        for number, source in enumerate(self.sources):
            if missing and (source.tls or source.certificates):
                raise ValueError(f"sources.{number} asks for TLS, and the section [tls] has no certificate")
        for number, destination in enumerate(self.destinations):
            if destination.tls and missing:
                raise ValueError(f"destinations.{number} asks for TLS, and the section [tls] has no certificate")
            if not destination.tls and (destination.authorities or destination.server_name):
                raise ValueError(f"destinations.{number} says whose certificate it has, and not tls = true")
        return self

    @model_validator(mode="after")
    def _audit_is_whole(self) -> "Settings":
        audit = self.audit
        if not audit.on:
            return self
        if audit.transport != "tls":
            if not _is_loopback(audit.host):
                raise ValueError(
                    f'audit.transport = "{audit.transport}" may reach this machine only, because messages name'
                    ' patients; use "tls", or a relay here'
                )
            return self
        if bool(audit.certificate) != bool(audit.key):
            raise ValueError(f"audit needs audit.{'key' if audit.certificate else 'certificate'} too")
        if not (audit.certificate or self.tls.on):
            raise ValueError("audit over TLS needs audit.certificate and audit.key, or those of [tls]")
        if not (audit.authorities or self.tls.on):
            raise ValueError("audit over TLS needs audit.authorities, or those of [tls]")
        return self

    @property
    def database_url(self) -> str:
        """The worklist's URL; by default SQLite in the storage folder."""
        return self.database.url or f"sqlite:///{self.storage.directory / 'worklist.db'}"

    @property
    def installed_weights(self) -> Path:
        """Folder of the weights that `remnant models install` put there."""
        return self.storage.directory / "models"

    @property
    def weights(self) -> str:
        """`model.weights`, an installed name turned into the path of its record."""
        name = self.model.weights
        path = self.installed_weights / name / f"{name}.json"
        return str(path) if "/" not in name and path.is_file() else name

    @property
    def listen_host(self) -> str:
        """The address to bind: loopback unless a source is configured, because without one anybody may send."""
        return self.node.host if self.sources or _is_loopback(self.node.host) else "127.0.0.1"

    @property
    def zone(self) -> ZoneInfo:
        """The zone of ContentDate and ContentTime."""
        return ZoneInfo(self.node.timezone or _system_zone())


OUR_CODES = tuple(f"RMN{number:03d}" for number in (*range(1, 13), *range(20, 31)))


def load(path: Path | None = None) -> Settings:
    """Read the settings from `path` (else ./node.toml if it is there, else defaults) and the environment.

    Raises
    ------
    SettingsError: one sentence that names the key or the file.
    """
    if path is None and Path("node.toml").is_file():
        path = Path("node.toml")
    where = str(path) if path else "the environment"
    values = _read(path) if path else {}
    try:
        _refuse_unknown_environment()
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError(f"In {where}: {_sentence(error)}") from error
    except ValueError as error:  # pydantic-settings: a section in the environment that is not JSON
        raise SettingsError(f"In the environment: {error}.") from error


def keys(model: type[BaseModel] = Settings, prefix: str = "") -> list[tuple[str, str, object]]:
    """List every key as (dotted name, description, default): for the docs and the test that holds them together."""
    listed: list[tuple[str, str, object]] = []
    for field_name, field in model.model_fields.items():
        name = f"{prefix}{field.alias or field_name}"
        section = _section_of(field.annotation)
        if section is not None:
            listed += keys(section, f"{name}.")
        else:
            listed.append((name, field.description or "", field.get_default()))
    return listed


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"The settings file {path} cannot be read: {error.strerror or error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"The settings file {path} is not valid TOML: {error}.") from error


def _refuse_unknown_environment() -> None:
    """pydantic-settings ignores a misspelt variable of ours; a port that is silently not changed costs a scan."""
    known = {f"REMNANT_{name}".upper() for name in Settings.model_fields}
    for variable in os.environ:
        if variable.upper().startswith("REMNANT_") and variable.upper().split("__", 1)[0] not in known:
            raise SettingsError(f"In the environment: {variable} is not a setting.")


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"]) or "settings"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{key} is not a setting; see deploy/node.toml for all of them."
    return f"{key}: {message}."


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _system_zone() -> str:
    """The system's IANA zone: TZ, else what /etc/localtime is a link to, else UTC."""
    parts = Path("/etc/localtime").resolve().parts
    linked = "/".join(parts[parts.index("zoneinfo") + 1 :]) if "zoneinfo" in parts else ""
    for name in (os.environ.get("TZ", "").lstrip(":"), linked):
        try:
            return ZoneInfo(name).key
        except (ZoneInfoNotFoundError, ValueError):
            continue  # TZ may be a POSIX rule such as CET-1CEST, which names no zone
    return "UTC"
