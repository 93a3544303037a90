"""The commands: what a person or a script says to the node.

Exit codes: `errors.exit_code`. With `--json`, standard output holds JSON Lines and nothing else. Modules are imported
inside the commands, because most commands must answer within a second and torch alone takes longer.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dicom_node import log, role
from dicom_node.errors import ANSWER_IS_NO, DONE, RemnantError, SettingsError, WrongUse, exit_code
from dicom_node.settings import Settings, load

app = typer.Typer(
    name="remnant",
    help="A DICOM node that reads iodine-131 neck scans. Not for diagnosis without review.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
worklist_app = typer.Typer(help="The worklist: one row for each scan, what became of it and why.", no_args_is_help=True)
db_app = typer.Typer(help="The worklist's database.", no_args_is_help=True)
app.add_typer(worklist_app, name="worklist")
app.add_typer(db_app, name="db")
audit_app = typer.Typer(help="What happened, and whether the record of it is whole.", no_args_is_help=True)
app.add_typer(audit_app, name="audit")
quarantine_app = typer.Typer(help="Objects that are kept and not used until a person looks.", no_args_is_help=True)
app.add_typer(quarantine_app, name="quarantine")
models_app = typer.Typer(
    help="Weights: which there are, what they may be used for, installing them.", no_args_is_help=True
)
app.add_typer(models_app, name="models")

Config = Annotated[
    Path | None,
    typer.Option("--config", help="Settings file; default ./node.toml, else built-in defaults.", metavar="FILE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON Lines for a machine to read.")]
RowId = Annotated[int, typer.Argument(help="The row's id, as `remnant worklist list` shows it.", metavar="ID")]
Weights = Annotated[str, typer.Argument(help="A name, as `remnant models list` shows it, or a path.", metavar="NAME")]
Quarantined = Annotated[str, typer.Argument(help="The id that `remnant quarantine list` shows.", metavar="ID")]


def main() -> None:
    """Run a command; turn our errors into one sentence and an exit code."""
    try:
        app()
    except RemnantError as error:
        Console(stderr=True, soft_wrap=True).print(f"remnant: {error}", markup=False, highlight=False)
        sys.exit(exit_code(error))


@app.command()
def demo(
    scans: Annotated[int, typer.Option(help="131I scans to send beside the special cases.", min=0)] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the simulated patients.", min=0)] = 1,
    directory: Annotated[
        Path, typer.Option("--dir", help="Folder for the demo; an earlier demo there is replaced.")
    ] = Path("demo"),
    keep: Annotated[bool, typer.Option("--keep", help="Leave node and archive running until Ctrl-C.")] = False,
) -> None:
    """See the whole thing: node, archive and a simulated camera on this machine; scans go in, findings come back."""
    from dicom_node.demo import run

    raise typer.Exit(DONE if run(directory, scans=scans, seed=seed, keep=keep, console=Console()) else ANSWER_IS_NO)


@app.command()
def serve(config: Config = None) -> None:
    """Run the node: receiver, worker, sender and scheduler, each a process, until SIGTERM or Ctrl-C."""
    from dicom_node.service import serve as run

    run(_start(config, "serve"), config)


@app.command()
def receive(config: Config = None) -> None:
    """Run only the receiver (C-ECHO, C-STORE). For several machines on one database."""
    _become("receive", config)


@app.command()
def work(config: Config = None) -> None:
    """Run only a worker: analyse what is queued, and keep the worklist's clockwork going."""
    _become("work", config)


@app.command()
def send(config: Config = None) -> None:
    """Run only the sender: deliver results to the destinations."""
    _become("send", config)


@app.command()
def analyse(
    paths: Annotated[list[Path], typer.Argument(help="DICOM files or folders, read recursively.", metavar="PATH...")],
    out: Annotated[Path, typer.Option(help="Folder for the SR and SC objects.", metavar="DIR")] = Path(
        "remnant-results"
    ),
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Analyse DICOM files without a node: print each finding, write Structured Report and Secondary Capture.

    Exit code 0: every 131I neck scan found has a finding. 1: a scan could not be judged, or there was none.
    """
    from dicom_node import offline
    from dicom_node.service import load_record
    from models.weights import WeightsError
    from pipeline.analyse import load_model

    settings = load(config)
    load_record(settings)
    files = offline.find_files(paths)
    started = time.monotonic()
    try:
        model = load_model(settings.weights)
    except WeightsError as error:
        raise SettingsError(f"model.weights: {error}") from error
    load_ms = 1000 * (time.monotonic() - started)
    console, errors = Console(), Console(stderr=True)
    judged, unjudged = 0, 0
    for verdict in _with_progress(offline.analyse_files(files, model, settings, out), errors):
        if isinstance(verdict, tuple):
            errors.print(f"{verdict[0]}: {verdict[1]}", markup=False, highlight=False)
            continue
        judged += verdict.answer.outcome == "analysed"
        unjudged += verdict.ours and verdict.answer.outcome != "analysed"
        if as_json:
            _print_json(verdict.as_json())
        else:
            _print_verdict(console, verdict, model.record.release, load_ms)
    if not judged and not unjudged:
        errors.print("No iodine-131 neck scan was found in these files.", highlight=False)
    raise typer.Exit(DONE if judged and not unjudged else ANSWER_IS_NO)


CohortFolder = Annotated[
    Path, typer.Option("--cohort", help="Folder of DICOM objects, read recursively.", metavar="DIR")
]
Labels = Annotated[
    Path,
    typer.Option(help="CSV: label (residual, clean) and StudyInstanceUID or SOPInstanceUID.", metavar="CSV"),
]


@app.command()
def train(
    cohort: CohortFolder,
    labels: Labels,
    out: Annotated[Path, typer.Option(help="Folder for record, report and runs.", metavar="DIR")],
    name: Annotated[str, typer.Option(help="Name of the weights record that is made.")] = "site-weights",
    network: Annotated[
        list[str] | None,
        typer.Option(help="Networks; the first one makes the record. Default: the paper's three.", metavar="NAME"),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Start: none, imagenet, or a path (.json, .safetensors, .pth); NETWORK=START for one network.",
            metavar="START",
        ),
    ] = None,
    weights_folder: Annotated[
        Path | None, typer.Option(help="Where torchvision's official files lie, for imagenet.", metavar="DIR")
    ] = None,
    groupings: Annotated[
        int, typer.Option(help="Random 3:1 groupings of the protocol; 0: only the record.", min=0)
    ] = 10,
    epochs: Annotated[int, typer.Option(help="Epochs of each training.", min=1)] = 80,
    batch_size: Annotated[int, typer.Option(help="Network inputs in a batch.", min=2)] = 16,
    learning_rate: Annotated[
        float | None, typer.Option(help="Default 1e-5, the paper's; 1e-3 from random numbers.", min=1e-8, max=1.0)
    ] = None,
    head_only: Annotated[bool, typer.Option("--head-only", help="Train the new head alone.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of groupings and trainings.", min=0)] = 131,
    sensitivity: Annotated[
        float, typer.Option(help="Share of residual scans that the operating point must call.", min=0.5, max=1.0)
    ] = 0.95,
    undetermined: Annotated[
        float, typer.Option(help="Share of scans the undetermined band may hold; 0: no band.", min=0.0, max=0.2)
    ] = 0.02,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Fine-tune on your own labelled scans: a weights record for research, and the paper's protocol with its report.

    Patients are divided, never images. Run again, it goes on where it was interrupted.
    """
    from dicom_node import training
    from pipeline.hospital_training import TrainingPlan
    from pipeline.protocol import PAPER_NETWORKS, ProtocolSettings

    settings = load(config)
    how = ProtocolSettings(
        architectures=tuple(dict.fromkeys(network or PAPER_NETWORKS)),
        groupings=groupings,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        frozen=head_only,
        seed=seed,
    )
    plan = TrainingPlan(name, sensitivity, undetermined, settings.analysis.preprocessing)
    errors = Console(stderr=True)

    def say(line: str) -> None:
        errors.print(line, markup=False, highlight=False, soft_wrap=True)

    with _bar(errors) as tell:
        made = training.train(
            _cohort_place(settings, cohort, labels, out),
            how,
            plan,
            weights or (),
            folder=weights_folder,
            tell=tell,
            say=say,
        )
    _print_made(made, as_json=as_json)


@app.command()
def evaluate(
    cohort: CohortFolder,
    labels: Labels,
    out: Annotated[Path, typer.Option(help="Folder for report, scores and exclusions.", metavar="DIR")],
    weights: Annotated[
        str | None, typer.Option(help="Name or record; default: those of the settings.", metavar="NAME")
    ] = None,
    protocol: Annotated[
        Path | None,
        typer.Option(help="Folder `protocol` of a training, to be reported as well.", metavar="DIR"),
    ] = None,
    criteria: Annotated[
        Path | None,
        typer.Option("--accept", help="TOML of criteria; makes acceptance.json, and exit code 1 if one fails."),
    ] = None,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Measure weights on your own labelled scans: every figure, stratum and curve, as HTML and PDF.

    Exit code 1: a criterion of --accept does not hold.
    """
    from dicom_node import training

    settings = load(config)
    with _bar(Console(stderr=True)) as tell:
        made = training.evaluate(
            _cohort_place(settings, cohort, labels, out),
            _weights_source(settings, weights) if weights else settings.weights,
            protocol=protocol,
            criteria=criteria,
            tell=tell,
        )
    _print_made(made, as_json=as_json)
    raise typer.Exit(ANSWER_IS_NO if made.acceptance is not None and not made.acceptance.passed else DONE)


@app.command()
def simulate(
    out: Annotated[Path, typer.Option(help="Folder to write to.", metavar="DIR")],
    count: Annotated[int, typer.Option(help="Number of examinations.", min=1)] = 10,
    seed: Annotated[int, typer.Option(help="First seed; the same seed gives the same bytes.", min=0)] = 1,
) -> None:
    """Write simulated 131I neck scans as valid NM DICOM, in all five shapes, with truth.csv."""
    from rich.progress import Progress

    from pipeline.camera import CohortExistsError
    from pipeline.camera import simulate as run

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("simulating", total=count)
        try:
            rows = run(out, count, seed, progress=lambda done, _total: bar.update(task, completed=done))
        except CohortExistsError as error:
            raise WrongUse(str(error)) from error
        except OSError as error:
            raise RemnantError(f"{out} cannot be written: {error.strerror or error}.") from error
    typer.echo(f"{len(rows)} files of {count} simulated examinations and truth.csv in {out}")


@app.command()
def doctor(as_json: AsJson = False, config: Config = None) -> None:
    """Check settings, packages, disk, database, weights and release; C-ECHO each destination."""
    from dicom_node.doctor import examine

    console, well = Console(), True
    for check in examine(load(config)):
        well = well and check.ok
        if as_json:
            _print_json({"check": check.name, "ok": check.ok, "detail": check.detail})
        else:
            mark = "[green]ok  [/green]" if check.ok else "[red]FAIL[/red]"
            console.print(f"{mark}  [bold]{check.name}[/bold]  ", end="")
            console.print(check.detail, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(DONE if well else ANSWER_IS_NO)


@app.command()
def conformance(
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write, - for standard output; by default CONFORMANCE.md or IHE-AI-RESULTS.md in deploy/.",
            metavar="FILE",
        ),
    ] = None,
    ihe: Annotated[bool, typer.Option("--ihe", help="Write the IHE AI Results narrative instead.")] = False,
    config: Config = None,
) -> None:
    """Write the DICOM conformance statement from the very tuples this node negotiates."""
    settings = load(config)
    if ihe:
        from dicom_node.ihe_narrative import narrative
        from dicom_node.service import load_record

        out = out or Path("deploy/IHE-AI-RESULTS.md")
        text = narrative(load_record(settings))
    else:
        from dicom_node.conformance import statement

        out = out or Path("deploy/CONFORMANCE.md")
        text = statement(settings)
    if str(out) == "-":
        typer.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RemnantError(f"{out} cannot be written: {error.strerror or error}.", hint="Give --out FILE.") from error
    typer.echo(f"wrote {out}")


@worklist_app.command("list")
def worklist_list(
    state: Annotated[str | None, typer.Option(help="Only rows in this state.")] = None,
    limit: Annotated[int, typer.Option(help="At most this many, newest first.", min=1)] = 50,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Show the newest rows."""
    from dicom_node import worklist

    if state is not None and state not in worklist.STATES:
        raise WrongUse(f"--state: {state!r} is not a state; states are {', '.join(worklist.STATES)}.")
    with _Database(config) as engine:
        _print_rows(worklist.rows(engine, state=state, limit=limit), as_json=as_json)


@worklist_app.command("show")
def worklist_show(row_id: RowId, as_json: AsJson = False, config: Config = None) -> None:
    """Show one row with its objects, results, deliveries and history."""
    from dicom_node import worklist

    with _Database(config) as engine:
        row = worklist.row(engine, row_id)
        details = worklist.details(engine, row_id)
        events = worklist.events(engine, row_id)
    if as_json:
        _print_json(row)
        return
    console = Console()
    _print_pairs(console, row)
    for name, items in details.items():
        _print_items(console, name.removesuffix("s") if name != "deliveries" else "delivery", items)
    _print_history(console, events)


@worklist_app.command("tail")
def worklist_tail(
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as rows change, until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("-n", help="Rows to begin with.", min=0)] = 10,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Show the rows that changed last; with -f go on showing changes as they happen."""
    from dicom_node import worklist

    with _Database(config) as engine:
        last = worklist.last_event_id(engine)
        begin = sorted(worklist.rows(engine, limit=max(lines, 1)), key=lambda row: str(row["updated_at"]))
        for row in begin[-lines:] if lines else []:
            _print_change(row, as_json=as_json)
        try:
            while follow:
                for event in worklist.changes_since(engine, last):
                    last = event.id
                    if event.scan_id is not None and event.to_state is not None:
                        _print_change(
                            {**worklist.row(engine, event.scan_id), "state": event.to_state}
                            if not as_json
                            else worklist.row(engine, event.scan_id),
                            as_json=as_json,
                        )
                time.sleep(0.2)
        except KeyboardInterrupt:
            return


@worklist_app.command("retry")
def worklist_retry(row_id: RowId, config: Config = None) -> None:
    """Analyse a row again, as a new revision."""
    from dicom_node import spool, worklist
    from dicom_node.wake import Bell

    settings = load(config)
    with _Database(config) as engine:
        whose = worklist.whose(engine, row_id)
        worklist.retry(engine, row_id)
    _record(settings, "worklist retry", "U", f"analysis of row {row_id} asked for again", whose)
    store = spool.open_spool(settings.storage.directory, int(settings.storage.min_free))
    Bell(store.run / "worker.bell").ring()
    typer.echo(f"row {row_id} is queued again")


@worklist_app.command("accept-identity")
def worklist_accept_identity(
    row_id: RowId,
    identity: Annotated[
        int | None, typer.Option(help="Which, by its id in `remnant worklist show`; needed where there are several.")
    ] = None,
    config: Config = None,
) -> None:
    """Make the identity that the archive, or a second sending, gave the scan's own; analyse it again for that one."""
    from dicom_node import spool, worklist
    from dicom_node.wake import Bell

    settings = load(config)
    with _Database(config) as engine:
        revision = worklist.accept_identity(engine, row_id, identity)
        whose = worklist.whose(engine, row_id)
    _record(settings, "worklist accept-identity", "U", f"identity accepted for row {row_id}", whose)
    store = spool.open_spool(settings.storage.directory, int(settings.storage.min_free))
    Bell(store.run / "worker.bell").ring()
    typer.echo(f"row {row_id} is queued as revision {revision}, for the accepted identity")


@worklist_app.command("recall")
def worklist_recall(
    row_id: RowId,
    reason: Annotated[str, typer.Option(help="Why, for whoever reads the study; no patient data, it stays for ever.")],
    code: Annotated[str, typer.Option(help="safety: rejected for patient safety; quality: for quality.")] = "safety",
    config: Config = None,
) -> None:
    """Withdraw the results sent of a row: a Key Object Selection that rejects them goes wherever they went."""
    from dicom_node import spool, worklist
    from dicom_node.recall import recall
    from dicom_node.wake import Bell

    if code != "safety" and code != "quality":
        raise SettingsError(f"--code: {code!r} is neither safety nor quality.")
    if not reason.strip():
        raise SettingsError("--reason: say why, in a few words.")
    settings = load(config)
    store = spool.open_spool(settings.storage.directory, int(settings.storage.min_free))
    with _Database(config) as engine:
        told = recall(
            engine, store, settings, row_id, why="safety" if code == "safety" else "quality", reason=reason.strip()
        )
        whose = worklist.whose(engine, row_id)
    _record(settings, "worklist recall", "U", f"results of row {row_id} withdrawn: {reason.strip()}", whose)
    Bell(store.run / "sender.bell").ring()
    typer.echo(f"row {row_id} is recalled; told: {', '.join(told)}")


@worklist_app.command("prove")
def worklist_prove(row_id: RowId, as_json: AsJson = False, config: Config = None) -> None:
    """Print the chain from each received digest to what was sent where, checking every digest on the way."""
    from dicom_node import spool, worklist
    from dicom_node.proof import prove

    settings = load(config)
    store = spool.open_spool(settings.storage.directory, int(settings.storage.min_free))
    with _Database(config) as engine:
        worklist.row(engine, row_id)
        links = prove(engine, store, row_id)
    console = Console()
    for link in links:
        if as_json:
            _print_json({"what": link.what, "ok": link.ok, "detail": link.detail})
        else:
            console.print("[green]ok  [/green]" if link.ok else "[red]FAIL[/red]", end="  ")
            console.print(f"{link.what}: {link.detail}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(DONE if all(link.ok for link in links) else ANSWER_IS_NO)


@db_app.command("upgrade")
def db_upgrade(config: Config = None) -> None:
    """Bring the database to this version's schema; the node does this by itself when it starts."""
    from dicom_node import worklist

    settings = load(config)
    engine = worklist.open_worklist(settings.database_url, busy_timeout_s=settings.database.busy_timeout_s)
    before = worklist.schema_is_current(engine)
    worklist.upgrade(engine)
    typer.echo("the schema was current already" if before else "the schema is current now")


@db_app.command("check")
def db_check(
    files: Annotated[bool, typer.Option(help="Compare every file with its digest too; reads the whole spool.")] = True,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Check the database, the chain of its history, and every file against its digest and its row."""
    from dicom_node import reconcile, spool, worklist

    settings = load(config)
    with _Database(config) as engine:
        faults = [*worklist.check(engine), *worklist.verify_history(engine)]
        if files:
            store = spool.open_spool(settings.storage.directory, int(settings.storage.min_free))
            read = _with_progress(reconcile.faulty_files(engine, store), Console(stderr=True), "reading files")
            faults += [fault for fault in read if fault]
    for fault in faults:
        if as_json:
            _print_json({"fault": str(fault)})
        else:
            typer.echo(str(fault))
    if not faults and not as_json:
        typer.echo("no faults found")
    raise typer.Exit(ANSWER_IS_NO if faults else DONE)


@db_app.command("backup")
def db_backup(
    path: Annotated[Path, typer.Argument(help="File to write; it holds patient identity.", metavar="FILE")],
    config: Config = None,
) -> None:
    """Write the whole worklist into one SQLite file and check it; the node may go on working."""
    from dicom_node import worklist

    with _Database(config) as engine:
        worklist.backup(engine, path)
    typer.echo(f"wrote {path}; copy the folders spool and results after it, not before")


@db_app.command("restore")
def db_restore(
    path: Annotated[Path, typer.Argument(help="A file that `remnant db backup` wrote.", metavar="FILE")],
    config: Config = None,
) -> None:
    """Make the worklist that of a backup, with the node stopped. What came since is entered again from the spool."""
    from dicom_node import spool, worklist
    from dicom_node.service import stopped

    settings = load(config)
    store = spool.open_spool(settings.storage.directory, int(settings.storage.min_free))
    with stopped(store):
        aside = worklist.restore(settings.database_url, path)
    typer.echo("restored" + (f"; what was there lies in {aside}" if aside else ""))
    typer.echo("the node enters what it finds in the spool when it starts")


@db_app.command("copy")
def db_copy(
    url: Annotated[str, typer.Argument(help="An empty database: postgresql+psycopg://... or sqlite:///FILE.")],
    config: Config = None,
) -> None:
    """Copy the whole worklist into another database, with the node stopped, and compare every line."""
    from dicom_node import spool, worklist
    from dicom_node.service import stopped

    settings = load(config)
    store = spool.open_spool(settings.storage.directory, int(settings.storage.min_free))
    with stopped(store), _Database(config) as engine:
        if worklist.other_sessions(engine):
            raise RemnantError("A node on another machine uses this database.", hint="Stop it first.")
        target = worklist.open_worklist(url, busy_timeout_s=settings.database.busy_timeout_s)
        try:
            copied = worklist.copy(engine, target)
        finally:
            target.dispose()
    typer.echo(", ".join(f"{count} {table}" for table, count in copied.items()))
    typer.echo("to use it, give its URL as [database] url in the settings")


@audit_app.command("verify")
def audit_verify(
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(help="Digest of a checkpoint from the log that must be among them.", metavar="SHA256"),
    ] = None,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Find an event that was changed, removed or added since it was written. Exit code 1 where there is one."""
    from dicom_node import worklist

    with _Database(config) as engine:
        faults = list(worklist.verify_history(engine))
        made = worklist.checkpoints(engine)
    known = {one.sha256 for one in made}
    faults += [f"there is no checkpoint {digest}: the history is older than it" for digest in checkpoint or ()
               if digest not in known]  # fmt: skip
    for fault in faults:
        if as_json:
            _print_json({"fault": fault})
        else:
            typer.echo(fault)
    if not faults and not as_json:
        last = f"; the last of {len(made)} checkpoints covers {made[-1]}" if made else "; there is no checkpoint yet"
        typer.echo(f"every event is as it was written{last}")
    raise typer.Exit(ANSWER_IS_NO if faults else DONE)


@quarantine_app.command("list")
def quarantine_list(as_json: AsJson = False, config: Config = None) -> None:
    """Show what is kept and not used, and why; without patient identity."""
    from dicom_node import quarantine, spool

    settings = load(config)
    store = spool.open_spool(settings.storage.directory, int(settings.storage.min_free))
    with _Database(config) as engine:
        found = [quarantine.shown(one, identity=False) for one in quarantine.held(engine, store)]
    if as_json:
        for one in found:
            _print_json(one)
        return
    names = ("id", "why", "scan_id", "sop_instance_uid", "source_aet", "received_at", "size_bytes")
    table = Table(*names)
    for one in found:
        table.add_row(*(_shown(name, one.get(name)) for name in names))
    Console().print(table)


@quarantine_app.command("show")
def quarantine_show(
    which: Quarantined,
    identity: Annotated[bool, typer.Option("--identity", help="Patient and order too.")] = False,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Show one object: where its file is, why it is here, and what its header says."""
    from dicom_node import quarantine, spool

    settings = load(config)
    store = spool.open_spool(settings.storage.directory, int(settings.storage.min_free))
    with _Database(config) as engine:
        told = quarantine.shown(quarantine.one_held(engine, store, which), identity=identity)
    if as_json:
        _print_json(told)
    else:
        _print_pairs(Console(), told)


@quarantine_app.command("release")
def quarantine_release(which: Quarantined, config: Config = None) -> None:
    """Put an object to work: it takes the place of the one whose UID it has, as a new revision."""
    from dicom_node import quarantine, spool, worklist
    from dicom_node.wake import Bell

    settings = load(config)
    store = spool.open_spool(settings.storage.directory, int(settings.storage.min_free))
    with _Database(config) as engine:
        receipt = quarantine.release(engine, store, settings, which)
        whose = worklist.whose(engine, receipt.scan_id)
    text = f"object {which} released from quarantine into row {receipt.scan_id}"
    _record(settings, "quarantine release", "U", text, whose)
    Bell(store.run / "worker.bell").ring()
    typer.echo(f"released into row {receipt.scan_id}, which is {receipt.state}")


@quarantine_app.command("discard")
def quarantine_discard(
    which: Quarantined,
    reason: Annotated[str, typer.Option(help="Why; no patient data, it stays in the history for ever.")],
    config: Config = None,
) -> None:
    """Remove the bytes of an object for good; the history keeps its digest and the reason."""
    from dicom_node import quarantine, spool

    if not reason.strip():
        raise WrongUse("--reason: say why, in a few words.")
    settings = load(config)
    store = spool.open_spool(settings.storage.directory, int(settings.storage.min_free))
    with _Database(config) as engine:
        whose = quarantine.whose(engine, quarantine.one_held(engine, store, which))
        quarantine.discard(engine, store, which, reason.strip())
    _record(settings, "quarantine discard", "D", f"object {which} removed from quarantine: {reason.strip()}", whose)
    typer.echo("discarded")


@models_app.command("list")
def models_list(as_json: AsJson = False, config: Config = None) -> None:
    """Show the weights that come with this version and those that were installed; * marks what the node uses."""
    from models.weights import WeightsError, available, find, installed, installed_path

    settings = load(config)
    folder = settings.installed_weights
    places = [(name, "shipped", name) for name in available()]
    places += [(name, "installed", str(installed_path(name, folder))) for name in installed(folder)]
    for name, origin, source in places:
        facts: dict[str, object] = {"name": name, "origin": origin, "in_use": source == settings.weights}
        try:
            record = find(source).record
            told = ("version", "release", "architecture", "preprocessing", "sha256")
            facts |= {fact: getattr(record, fact) for fact in told}
        except WeightsError as error:
            facts["error"] = str(error)
        if as_json:
            _print_json(facts)
        else:
            rest = [str(value) for fact, value in facts.items() if fact not in ("name", "in_use", "sha256")]
            typer.echo(f"{'*' if facts['in_use'] else ' '} {name:<32}  {'  '.join(rest)}")


@models_app.command("show")
def models_show(which: Weights, as_json: AsJson = False, config: Config = None) -> None:
    """Show a record: what it was trained on, how it was measured, what it may be used for."""
    from dataclasses import asdict

    from models.weights import WeightsError, find

    try:
        record = asdict(find(_weights_source(load(config), which)).record)
    except WeightsError as error:
        raise WrongUse(f"{error}.") from error
    if as_json:
        _print_json(record)
        return
    console = Console()
    for name, value in record.items():
        if isinstance(value, Mapping):
            console.print(f"[bold]{name}[/bold]")
            for inner, item in value.items():
                console.print(f"  {inner:<30} {item}", markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(f"[bold]{name:<24}[/bold]", end="")
            console.print(f"{value if value is not None else '-'}", markup=False, highlight=False, soft_wrap=True)


@models_app.command("verify")
def models_verify(
    which: Annotated[
        list[str] | None,
        typer.Argument(help="Names or paths of records; without any, all there are.", metavar="[NAME...]"),
    ] = None,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Check records and compare the digests of their files. Exit code 1 where one does not hold."""
    from models.weights import WeightsError, available, installed, verify

    settings, well = load(config), True
    for name in which or (*available(), *installed(settings.installed_weights)):
        try:
            detail, holds = f"sha256 {verify(_weights_source(settings, name)).record.sha256}", True
        except WeightsError as error:
            detail, holds, well = str(error), False, False
        if as_json:
            _print_json({"name": name, "ok": holds, "detail": detail})
        else:
            typer.echo(f"{'ok  ' if holds else 'FAIL'}  {name}  {detail}")
    raise typer.Exit(DONE if well else ANSWER_IS_NO)


@models_app.command("install")
def models_install(
    path: Annotated[Path, typer.Argument(help="The record's .json file, its tensors beside it.", metavar="RECORD")],
    config: Config = None,
) -> None:
    """Check a record and its tensors and copy them into the storage folder, to be used by name.

    Refused, with exit code 1: what does not load, a name that is taken, other preprocessing than this version's, and
    release "local" without an acceptance report signed for these very weights.
    """
    from models.weights import WeightsError, find, install
    from pipeline.analyse import WrongPreprocessing, check_preprocessing

    settings = load(config)
    try:
        record = find(str(path.absolute())).record
        check_preprocessing(record, record.preprocessing)
        place = install(path, settings.installed_weights)
    except (WeightsError, WrongPreprocessing) as error:
        typer.echo(f"remnant: not installed: {error}", err=True)
        raise typer.Exit(ANSWER_IS_NO) from error
    typer.echo(f"installed {record.name} ({record.release}) in {place.record_path.parent}")
    typer.echo(f'to use it: [model] weights = "{record.name}" in the settings, then start the node again')


@models_app.command("accept")
def models_accept(
    record: Annotated[Path, typer.Argument(help="The record's .json file, its tensors beside it.", metavar="RECORD")],
    report: Annotated[Path, typer.Option(help="acceptance.json of `remnant evaluate --accept`.", metavar="FILE")],
    signed_by: Annotated[str, typer.Option(help="Who answers for it: a name.")],
    camera: Annotated[str, typer.Option(help="The camera it is accepted for.")],
    name: Annotated[str, typer.Option(help="Name of the accepted weights; another than before.")],
    out: Annotated[Path, typer.Option(help="Folder for the accepted record.", metavar="DIR")],
    config: Config = None,
) -> None:
    """Make a record of release "local" from weights whose evaluation met every criterion, signed by name.

    Refused: other weights or preprocessing than were evaluated, a criterion that does not hold, simulated scans.
    """
    from dicom_node import training
    from models.weights import WeightsError
    from pipeline.acceptance import AcceptanceError

    load(config)
    try:
        path = training.accept(record, report, signed_by=signed_by, camera=camera, name=name, out=out)
    except (AcceptanceError, WeightsError) as error:
        typer.echo(f"remnant: not accepted: {error}", err=True)
        raise typer.Exit(ANSWER_IS_NO) from error
    typer.echo(f"accepted as {name} in {path}")
    typer.echo(f"to install it: remnant models install {path}")


def _cohort_place(settings: Settings, cohort: Path, labels: Path, out: Path) -> Any:
    from dicom_node.training import CohortPlace

    analysis = settings.analysis
    return CohortPlace(cohort, labels, out, analysis.pair_window_s, analysis.require_views)


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for what a long command tells; on a terminal only."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("starting", total=None)

        def tell(what: str, done: int, whole: int) -> None:
            bar.update(task, description=what, completed=done, total=whole)

        yield tell


def _print_made(made: Any, *, as_json: bool) -> None:
    from dicom_node import training

    for one in made.excluded:
        if as_json:
            _print_json({"kind": "excluded"} | dict(training.excluded_as_json(one)))
        else:
            typer.echo(f"left out  {one.what}: {one.detail} ({one.reason})")
    figures = training.figures_as_json(made.figures)
    if as_json:
        for one in made.scored:
            _print_json({"kind": "scan"} | training.scored_as_json(one))
        _print_json({"kind": "figures"} | figures)
        record = None if made.trained is None else str(made.trained.record_path)
        passed = None if made.acceptance is None else made.acceptance.passed
        _print_json({"kind": "made", "report": str(made.report), "record": record, "accepted": passed})
        return
    for name in ("scans", "accuracy", "sensitivity", "specificity", "auc", "undetermined", "declined"):
        value, low, high = figures[name], figures.get(f"{name}_low"), figures.get(f"{name}_high")
        told = "not defined" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
        typer.echo(f"{name:<14}{told}" + ("" if low is None else f"  (95 % {low:.4f} to {high:.4f})"))
    if made.acceptance is not None:
        for one in made.acceptance.criteria:
            limit = f"{'at least' if one.least else 'at most'} {one.limit:g}"
            found = "not defined" if one.found is None else f"{one.found:.4f}"
            typer.echo(f"{'pass' if one.passed else 'FAIL'}  {one.name}: {found}, {limit}")
    if made.trained is not None:
        typer.echo(f"wrote {made.trained.record_path}; to use it: remnant models install {made.trained.record_path}")
    typer.echo(f"wrote {made.report} and report.pdf beside it")


def _weights_source(settings: Settings, name: str) -> str:
    """What a person calls weights, as `models.weights.find` takes it: an installed name becomes its record's path."""
    from models.weights import installed, installed_path

    folder = settings.installed_weights
    return str(installed_path(name, folder)) if name in installed(folder) else name


def _start(config: Path | None, role: str) -> Settings:
    settings = load(config)
    log.set_up(as_json=settings.log.json_lines, role=role)
    return settings


def _become(name: str, config: Path | None) -> None:
    """Go on as that role, in this process: whoever started us and watches us need not notice."""
    sys.stdout.flush()
    sys.stderr.flush()
    command = role.command(name, config, supervised=False)
    os.execv(command[0], command)  # noqa: S606 - our own interpreter


def _record(settings: Settings, command: str, action: Any, why: str, whose: Any) -> None:
    """Tell the audit record repository what a person did."""
    from dicom_node.audit import Recorder

    Recorder(settings, f"remnant {command}").acted(action, why, whose)


class _Database:
    """The worklist for one command: opened, its schema checked, closed."""

    def __init__(self, config: Path | None) -> None:
        self._settings = load(config)

    def __enter__(self) -> Any:
        from dicom_node import worklist

        url = self._settings.database_url
        if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists():
            raise RemnantError(
                f"There is no worklist at {url.removeprefix('sqlite:///')}.",
                hint="Run this where the node runs, or give its --config.",
            )
        self._engine = worklist.open_worklist(url, busy_timeout_s=self._settings.database.busy_timeout_s)
        if not worklist.schema_is_current(self._engine):
            raise RemnantError("The database has another version's schema.", hint="Run `remnant db upgrade`.")
        return self._engine

    def __exit__(self, *_: object) -> None:
        self._engine.dispose()


def _print_json(item: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(item, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


_LISTED = (
    "id",
    "state",
    "finding",
    "probability",
    "reason",
    "views",
    "acquired_at",
    "source_aet",
    "delivered_to",
    "last_error",
)


_ONLY_WIDE = ("views", "acquired_at", "source_aet")
_NEVER_FOLDED = ("id", "state", "finding", "probability")
_WIDE = 160
"""Columns of a terminal that shows all of `_LISTED`."""


def _print_rows(rows: Iterable[Mapping[str, Any]], *, as_json: bool) -> None:
    if as_json:
        for row in rows:
            _print_json(row)
        return
    console = Console()
    # Never cut in the middle of a word: a narrow screen loses columns that `show` has, the others are folded.
    names = [name for name in _LISTED if console.width >= _WIDE or name not in _ONLY_WIDE]
    table = Table(box=None, padding=(0, 1))
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=name in _NEVER_FOLDED)
    for row in rows:
        table.add_row(*(_shown(name, row[name]) for name in names))
    console.print(table)


def _print_change(row: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        _print_json(row)
        return
    parts = [f"{row['updated_at']}", f"#{row['id']}", f"r{row['revision']}", f"{row['state']:<10}"]
    if row["finding"] and row["probability"] is not None:
        parts.append(f"{row['finding']} {_shown('probability', row['probability'])}")
    parts += [str(row[name]) for name in ("reason", "views", "last_error") if row[name]]
    typer.echo("  ".join(parts))


def _print_pairs(console: Console, row: Mapping[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    for name, value in row.items():
        table.add_row(f"[bold]{name}[/bold]", _shown(name, value))
    console.print(table)


def _print_items(console: Console, title: str, items: Iterable[Mapping[str, Any]]) -> None:
    """Print each item as a block of its filled fields: a UID or a digest that a table has cut is of no use."""
    for number, item in enumerate(items, 1):
        console.print(f"\n[bold]{title} {number}[/bold]")
        for name, value in item.items():
            if value not in (None, ""):
                console.print(f"  {name:<20} {value}", markup=False, highlight=False, soft_wrap=True)


def _print_history(console: Console, events: Iterable[Any]) -> None:
    console.print("\n[bold]history[/bold]")
    for event in events:
        change = f"{event.from_state or ''} -> {event.to_state}" if event.to_state else ""
        line = f"  {event.at}  r{event.revision or 0}  {event.event:<16} {change:<24} {event.detail or ''}"
        console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)


def _shown(name: str, value: object) -> str:
    from rich.markup import escape

    from pipeline.wording import percent

    if value is None:
        return ""
    if name == "delivered_to" and isinstance(value, Mapping):
        return ", ".join(f"{escape(str(place))}: {state}" for place, state in value.items())
    return f"{percent(value)} %" if name == "probability" and isinstance(value, float) else escape(str(value))


def _print_verdict(console: Console, verdict: Any, release: str, load_ms: float) -> None:
    from pipeline.reasons import REASONS
    from pipeline.wording import percent

    told = verdict.answer

    def line(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    line(f"study {verdict.study_instance_uid}", "bold")
    if told.finding is not None:
        line(f"  finding       residual thyroid tissue {told.finding}")
        line(f"  probability   {percent(told.probability)} %")
        line(f"  views         {', '.join(told.views)}")
        line(f"  model         {told.model} ({release}), sha256 {told.model_sha256}")
        line(f"  preprocessing {verdict.preprocessing}")
        steps = ", ".join(f"{step} {value:.0f}" for step, value in told.timings_ms.items() if step != "total")
        line(f"  time          {told.timings_ms.get('total', 0.0):.0f} ms ({steps}); model loaded in {load_ms:.0f} ms")
        line("  Not for diagnosis without review.")
    else:
        line(f"  NOT ANALYSED  {REASONS[told.reason].sentence} ({told.reason})")
        if told.detail:
            line(f"  detail        {told.detail}")
        line(f"  what to do    {REASONS[told.reason].hint}")
    for path in verdict.files:
        line(f"  wrote         {path}")


def _with_progress(items: Iterable[Any], console: Console, what: str = "analysing") -> Iterable[Any]:
    from rich.progress import track

    if not sys.stderr.isatty():
        return items
    listed: Callable[..., Iterable[Any]] = track
    return listed(items, description=what, console=console, transient=True)


if __name__ == "__main__":
    main()
