"""Settings: the documented file and the code say the same, and everything wrong is named by its key."""

import itertools
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from dicom_node.errors import SettingsError
from dicom_node.settings import Settings, keys, load

DOCUMENTED = Path(__file__).parents[2] / "deploy" / "node.toml"

CONTRACT = """
[node]
ae_title = "REMNANT"
host = "0.0.0.0"            # loopback unless at least one source is configured
port = 11112
timezone = "Europe/Berlin"   # default: the system's
[receiver]
extra_classes = []
idle_timeout_s = 30
max_associations = 200
[storage]
directory = "var"           # spool, quarantine, results
min_free = "2 GiB"          # below it: A700 before anything is written
retention_days = 30
forget_days = 365
[database]
url = "sqlite:///var/worklist.db"    # or postgresql+psycopg://...
[[sources]]
ae_title = "OPTIMA1"
hosts = ["10.0.0.12"]       # empty: any address
port = 104                   # only for commitment = "proxy"
commitment = "off"           # "proxy": answered once an archive has committed the source objects
[[destinations]]
name = "pacs"
ae_title = "ARCHIVE"
host = "10.0.0.20"
port = 104
results = ["sr", "sc"]       # and "seg"
sc = "colour"                # or "grey"
storage_commitment = false
query = false                # identity guard by C-FIND before sending
test = false                 # may receive results of demonstration weights
tls = false
[delivery]
first_retry_s = 30
max_retry_s = 3600
give_up_after_days = 7
[analysis]
preprocessing = "native"     # or "paper"
require_views = ["anterior", "posterior"]
pair_window_s = 3600
views_timeout_s = 3600       # a second view may be acquired and sent after the first
timeout_s = 60
attempts = 3
[model]
weights = "remnant-resnet18-phantom"  # a name in models/cards or a path
[codes]                      # a site's own codes for ours, e.g. RMN001 = ["1234", "99SITE", "..."]
[tls]                        # omitted: plain only
port = 2762
certificate = ""
key = ""
authorities = ""
[audit]                      # omitted: off
[log]
json = false
[web]
host = "127.0.0.1"
port = 8080
"""

SOURCE = '[[sources]]\nae_title = "CAMERA1"\n'
DESTINATION = '[[destinations]]\nname = "pacs"\nae_title = "ARCHIVE"\nhost = "10.0.0.20"\n'


@pytest.fixture(autouse=True)
def _no_settings_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a node.toml nor a variable of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.upper().startswith("REMNANT_")]:
        monkeypatch.delenv(variable)


def written(text: str) -> Path:
    path = Path("node.toml")
    path.write_text(text, encoding="utf-8")
    return path


def refusal(text: str) -> str:
    """The sentence that a file is refused with."""
    with pytest.raises(SettingsError) as refused:
        load(written(text))
    return str(refused.value)


def flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each key of a TOML table by its dotted name, as `keys` lists them; [codes] is one key, its entries are free."""
    for name, value in table.items():
        if name == "codes" and not prefix:
            yield name, value
        elif isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for item in value:
                yield from flat(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_the_documented_file_names_every_key_once_and_no_other() -> None:
    documented = [name for name, _ in flat(tomllib.loads(DOCUMENTED.read_text(encoding="utf-8")))]
    assert documented == [name for name, _, _ in keys()]


def test_the_documented_file_loads_and_shows_the_defaults() -> None:
    loaded, defaults = load(DOCUMENTED), Settings()
    assert loaded.sources[0].ae_title == "OPTIMA1"
    assert loaded.destinations[0].name == "pacs"
    assert loaded.model_copy(update={"sources": (), "destinations": ()}) == defaults


def test_the_documented_file_shows_the_defaults_of_sources_and_destinations_too() -> None:
    examples = {"sources.hosts"}  # "any address" would be no example
    defaults = {name: default for name, _, default in keys() if default is not PydanticUndefined}
    shown = dict(flat(tomllib.loads(DOCUMENTED.read_text(encoding="utf-8"))))
    for name in defaults.keys() - examples:
        if name.startswith(("sources.", "destinations.")):
            assert shown[name] == (list(defaults[name]) if isinstance(defaults[name], tuple) else defaults[name]), name


def test_every_key_of_the_documented_file_has_its_comment() -> None:
    lines = DOCUMENTED.read_text(encoding="utf-8").splitlines()
    found = 0
    for before, line in itertools.pairwise(lines):
        if " = " in line and not line.startswith("#"):
            found += 1
            assert before.startswith("# "), line
    assert found == len(keys()) - 1  # [codes] is a section


def test_every_key_has_a_docstring() -> None:
    assert [name for name, description, _ in keys() if not description] == []


def test_the_example_of_the_contract_loads() -> None:
    settings = load(written(CONTRACT))
    assert settings.zone == ZoneInfo("Europe/Berlin")
    assert settings.database_url == "sqlite:///var/worklist.db"
    assert settings.sources[0].hosts == ("10.0.0.12",)
    assert settings.destinations[0].results == ("sr", "sc")
    assert int(settings.storage.min_free) == 2 * 1024**3


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('[node]\nae_titel = "X"\n', "node.ae_titel is not a setting"),
        ("[nodes]\nport = 1\n", "nodes is not a setting"),
        (SOURCE + 'host = "10.0.0.1"\n', "sources.0.host is not a setting"),
        ('[node]\nae_title = "SEVENTEEN CHARS 17"\n', "node.ae_title: "),
        ('[node]\nae_title = "A\\\\B"\n', "node.ae_title: "),
        ('[node]\nae_title = "KAMERA\\u00C4"\n', "node.ae_title: "),
        ('[node]\nae_title = " "\n', "node.ae_title: "),
        ("[node]\nport = 70000\n", "node.port: "),
        ('[node]\ntimezone = "Europe/Berlim"\n', "node.timezone: unknown time zone 'Europe/Berlim'"),
        ('[node]\ntimezone = "/etc/passwd"\n', "node.timezone: unknown time zone"),
        ('[receiver]\nidle_timeout_s = "30 minutes"\n', "receiver.idle_timeout_s: "),
        ("[receiver]\nidle_timeout_s = 0\n", "receiver.idle_timeout_s: "),
        ("[receiver]\nmax_associations = -1\n", "receiver.max_associations: "),
        ("[storage]\nmin_free = 2\n", 'storage.min_free: give a size with its unit, such as "2 GiB"'),
        ('[storage]\nmin_free = "2"\n', 'storage.min_free: give a size with its unit, such as "2 GiB"'),
        ('[storage]\nmin_free = "2 GiBs"\n', "storage.min_free: "),
        ("[storage]\nretention_days = 0.5\n", "storage.retention_days: "),
        ('[database]\nurl = "mysql://x/y"\n', "database.url: "),
        (SOURCE + 'hosts = ["camera.example"]\n', "sources.0.hosts.0: give an IP address or a network"),
        (DESTINATION + "results = []\n", "destinations.0.results: "),
        (DESTINATION + 'sc = "color"\n', "destinations.0.sc: "),
        (DESTINATION.replace('"pacs"', '"p a c s"'), "destinations.0.name: "),
        ('[[destinations]]\nname = "pacs"\nhost = "x"\n', "destinations.0.ae_title: "),
        (DESTINATION + DESTINATION, "two of them have the same name"),
        ('[analysis]\nrequire_views = ["lateral"]\n', "analysis.require_views.0: "),
        ('[analysis]\npreprocessing = "fast"\n', "analysis.preprocessing: "),
        ('[codes]\nRMN013 = ["1", "99SITE", "x"]\n', "codes: RMN013 is not a code of ours"),
        ('[codes]\nRMN001 = ["1", "99SITE"]\n', "codes.RMN001"),
        ('[tls]\ncertificate = "node.pem"\n', "TLS needs tls.key and tls.authorities too"),
        ('[tls]\nkey = "node.key"\nauthorities = "ca.pem"\n', "TLS needs tls.certificate too"),
        ("[tls]\nplain = false\n", "tls.plain = false leaves no port to call"),
        ('[audit]\nhost = "arr"\n', "audit over TLS needs audit.certificate and audit.key, or those of [tls]"),
        ('[audit]\nhost = "arr"\ncertificate = "a.pem"\n', "audit needs audit.key too"),
        ('[audit]\nhost = "arr"\ncertificate = "a"\nkey = "b"\n', "audit over TLS needs audit.authorities"),
        ('[audit]\nhost = "10.0.0.5"\ntransport = "tcp"\n', 'audit.transport = "tcp" may reach this machine only'),
        ('[audit]\nhost = "arr"\ntransport = "udp"\n', 'audit.transport = "udp" may reach this machine only'),
        (SOURCE + "tls = true\n", "sources.0 asks for TLS, and the section [tls] has no certificate"),
        (SOURCE + 'certificates = ["camera"]\n', "sources.0 asks for TLS"),
        (DESTINATION + "tls = true\n", "destinations.0 asks for TLS, and the section [tls] has no certificate"),
        (DESTINATION + 'server_name = "pacs"\n', "destinations.0 says whose certificate it has, and not tls = true"),
        (DESTINATION + 'results = ["seg"]\n', 'destinations.0.results: a segmentation needs "sr" or "sc" beside it'),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line_that_names_it(text: str, named: str) -> None:
    sentence = refusal(text)
    assert named in sentence
    assert "node.toml" in sentence
    assert "\n" not in sentence


def test_a_camera_is_promised_no_commitment_that_no_archive_could_make() -> None:
    text = SOURCE + 'commitment = "proxy"\n'
    assert "no destination with storage_commitment = true" in refusal(text)
    archive = '[[destinations]]\nname = "pacs"\nae_title = "ARCHIVE"\nhost = "10.0.0.20"\nstorage_commitment = true\n'
    assert load(written(text + archive)).sources[0].commitment == "proxy"


def test_a_missing_file_is_refused_by_its_name() -> None:
    with pytest.raises(SettingsError, match=r"elsewhere\.toml cannot be read: No such file"):
        load(Path("elsewhere.toml"))


def test_a_folder_in_place_of_the_file_is_refused_by_its_name() -> None:
    Path("conf.toml").mkdir()
    with pytest.raises(SettingsError, match=r"conf\.toml cannot be read: "):
        load(Path("conf.toml"))


def test_what_is_no_toml_is_refused_with_the_place() -> None:
    assert "is not valid TOML: " in refusal("[node\nport = 1\n")


def test_what_is_no_utf_8_is_refused() -> None:
    Path("node.toml").write_bytes(b'[node]\nae_title = "\xff"\n')
    with pytest.raises(SettingsError, match="is not valid TOML"):
        load(Path("node.toml"))


def test_a_file_named_node_toml_here_is_read_without_being_asked_for() -> None:
    assert load().node.port == 11112
    written("[node]\nport = 11113\n")
    assert load().node.port == 11113


def test_the_environment_overrides_the_file_key_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMNANT_NODE__PORT", "11113")
    settings = load(written('[node]\nport = 104\nae_title = "SITE7"\n'))
    assert (settings.node.port, settings.node.ae_title) == (11113, "SITE7")


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("REMNANT_NODES__PORT", "11113", "REMNANT_NODES__PORT is not a setting"),
        ("REMNANT_PORT", "11113", "REMNANT_PORT is not a setting"),
        ("REMNANT_NODE__PROT", "11113", "node.prot is not a setting"),
        ("REMNANT_NODE__PORT", "eleven", "node.port: "),
        ("REMNANT_NODE", "not json", "node"),
    ],
)
def test_a_wrong_variable_is_refused_by_its_name(
    variable: str, value: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as refused:
        load()
    assert named in str(refused.value)
    assert "environment" in str(refused.value)


def test_settings_do_not_change() -> None:
    settings = load()
    with pytest.raises(ValidationError):
        settings.node = settings.node
    with pytest.raises(ValidationError):
        settings.node.port = 104


def test_without_a_source_the_node_listens_on_loopback_only() -> None:
    assert load().listen_host == "127.0.0.1"
    assert load(written(SOURCE)).listen_host == "0.0.0.0"  # noqa: S104 - the value the contract gives
    assert load(written('[node]\nhost = "::1"\n')).listen_host == "::1"


def test_the_zone_is_always_one_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert load().zone == ZoneInfo("Asia/Tokyo")
    monkeypatch.setenv("TZ", "CET-1CEST")  # a POSIX rule names no zone
    assert load().zone.key


def test_an_installed_name_leads_to_its_record_and_any_other_word_stays_as_it_is(tmp_path: Path) -> None:
    settings = Settings(storage={"directory": tmp_path}, model={"weights": "ward-7"})
    assert settings.weights == "ward-7"
    record = settings.installed_weights / "ward-7" / "ward-7.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    assert settings.weights == str(record)
    assert Settings(storage={"directory": tmp_path}, model={"weights": str(record)}).weights == str(record)
    assert Settings(storage={"directory": tmp_path}).weights == "remnant-resnet18-phantom"
