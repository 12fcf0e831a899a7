"""What people see of a store: its contents, what an extraction will take, what verification found."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from cachefuse.files import JsonObject, format_bytes
from cachefuse_cli.shared.render import err, new_table, out

if TYPE_CHECKING:
    from cachefuse.extraction.plan import Plan
    from cachefuse.extraction.verify import Verification
    from cachefuse.store.inspect import Inspection, StoredView


def inspect_report(found: "Inspection") -> None:
    """Samples, views with their shapes, sizes and progress, and what made them."""
    console = out()
    splits = ", ".join(f"{split} {n:,}" for split, n in found.splits.items())
    console.print(
        Text.assemble(("dataset ", "dim"), (found.dataset, "bold"), f": {found.rows:,} samples ({splits})"),
        soft_wrap=True,
    )
    present = ", ".join(f"{modality} {n:,}" for modality, n in found.present.items())
    console.print(Text(f"{len(found.classes):,} classes; present: {present}; last extract {found.extracted[:19]} UTC"))
    views = new_table("encoder", "modality", "view", "shape", "dtype", "size", "rows", numbers=2)
    for view in found.views:
        shape = " x ".join(f"{n:,}" if isinstance(n, int) else n for n in view.shape)
        names = escape(view.encoder), view.modality, view.view
        views.add_row(*names, shape, view.dtype, format_bytes(view.n_bytes), _progress(view))
    console.print(views)
    for (encoder, modality), provenance in found.provenance.items():
        console.print(Text.assemble("\n", (encoder, "bold"), f" ({modality}) was made by"))
        for field, value in provenance.items():
            console.print(Text.assemble((f"  {field:<14}", "dim"), value), soft_wrap=True)
    console.print()
    if found.bad:
        console.print(f"{len(found.bad):,} bad sample{'s' * (len(found.bad) > 1)}; cachefuse inspect --bad lists them")
    console.print(Text.assemble(("store ", "dim"), str(found.path)), soft_wrap=True)


def _progress(view: "StoredView") -> str:
    return "all" if view.done == view.rows else f"[yellow]{view.done / max(1, view.rows):.1%}[/]"


def inspect_dict(found: "Inspection") -> JsonObject:
    return {
        "store": str(found.path),
        "dataset": found.dataset,
        "extracted": found.extracted,
        "rows": found.rows,
        "splits": found.splits,
        "classes": list(found.classes),
        "present": found.present,
        "views": [asdict(view) for view in found.views],
        "encoders": [
            {"encoder": encoder, "modality": modality, "source": found.sources[(encoder, modality)], "provenance": made}
            for (encoder, modality), made in found.provenance.items()
        ],
        "bad": [vars(line) for line in found.bad],
    }


def bad_report(found: "Inspection") -> None:
    """The ledger: every sample that a modality had to do without, its file and the reason."""
    console = out()
    if not found.bad:
        console.print(f"Every sample of {found.dataset} that has been read could be used.")
        return
    listed = new_table("sample", "modality", "reason", "file")
    for line in found.bad:
        listed.add_row(escape(line.id), line.modality, escape(line.reason), escape(line.source))
    console.print(listed)


def plan_report(plan: "Plan") -> None:
    """Rows, bytes and time by view, and whether the disk has room."""
    console = out()
    views = new_table("encoder", "modality", "view", "rows", "to do", "a row", "in all", "time", numbers=5)
    timed: set[tuple[str, str]] = set()
    for view in plan.views:
        place = (view.encoder, view.modality)
        time = "" if place in timed else _duration(plan.seconds[place])
        timed.add(place)
        sizes = (format_bytes(view.row_bytes), format_bytes(view.n_bytes))
        names = escape(view.encoder), view.modality, view.view
        views.add_row(*names, f"{view.rows:,}", f"{view.pending:,}", *sizes, time)
    console.print(views)
    if any(view.pending for view in plan.views):
        total = f"{format_bytes(plan.n_bytes)} to write, {format_bytes(plan.free)} free; "
        room = "[green]the disk has room[/]" if plan.fits else "[bold red]the disk has no room for that[/]"
        console.print(f"{total}{room}; about {_duration(sum(plan.seconds.values()))}")
        step = "cachefuse extract, with the same options"
    else:
        console.print("Nothing to compute: every feature is there already.")
        step = "cachefuse train-head"
    console.print(Text.assemble(("store ", "dim"), str(plan.store)), soft_wrap=True)
    if plan.fits:
        console.print(Text.assemble(("next  ", "dim"), step))


def plan_dict(plan: "Plan") -> JsonObject:
    return {
        "store": str(plan.store),
        "views": [{**asdict(view), "n_bytes": view.n_bytes} for view in plan.views],
        "seconds": [{"encoder": e, "modality": m, "seconds": seconds} for (e, m), seconds in plan.seconds.items()],
        "n_bytes": plan.n_bytes,
        "free": plan.free,
        "fits": plan.fits,
    }


def verify_report(found: "Verification") -> None:
    """What was read, and what is damaged."""
    console = out()
    views = new_table("encoder", "modality", "view", "blocks", "read", "NaN", "inf", "zero rows", numbers=5)
    for view in found.views:
        blocks = f"{view.finished:,}" if view.finished == view.blocks else f"{view.finished:,}/{view.blocks:,}"
        names = escape(view.encoder), view.modality, view.view
        views.add_row(*names, blocks, format_bytes(view.n_bytes), f"{view.nan:,}", f"{view.inf:,}", f"{view.zero:,}")
    console.print(views)
    for view in found.views:
        if view.cosine:
            mean, least = view.cosine
            name = f"{escape(view.encoder)} ({view.modality}, {view.view})"
            console.print(f"{name}: int8, cosine to float16 {mean:.5f} on average, at least {least:.5f}")
    if found.damage:
        _damage(found, console)
        console.print("Compute these blocks again, and only these: cachefuse verify --repair")
    else:
        console.print("[green]Every finished block is what was written.[/]")
    console.print(Text.assemble(("store ", "dim"), str(found.path)), soft_wrap=True)


def damage_report(found: "Verification") -> None:
    """What is about to be repaired."""
    _damage(found, err())


def _damage(found: "Verification", console: Console) -> None:
    for damage in found.damage:
        place = f"{damage.encoder} ({damage.modality}, {damage.view})" if damage.encoder else damage.view
        block = "" if damage.block is None else f" block {damage.block}"
        console.print(Text.assemble(("damaged ", "bold red"), f"{place}{block}: {damage.reason}"), soft_wrap=True)


def verify_dict(found: "Verification") -> JsonObject:
    return {
        "store": str(found.path),
        "sound": not found.damage,
        "views": [asdict(view) for view in found.views],
        "damage": [asdict(damage) for damage in found.damage],
    }


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 1:
        return "under 1 s" if seconds else "0 s"
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.0f} min" if minutes < 90 else f"{hours:.1f} h"
