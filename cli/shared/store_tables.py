"""Tables of a store: its contents, the plan of an extraction, the result of a verification."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from cachefuse.files import JsonObject, format_bytes
from cachefuse.printable import listed
from cachefuse_cli.shared.console import Console, Text, err, new_table, out

if TYPE_CHECKING:
    from cachefuse.extraction.plan import Plan
    from cachefuse.extraction.verify import Verification
    from cachefuse.store.inspect import Inspection, StoredView
    from cachefuse.training.duplicates import Duplicates


def inspect_report(inspection: "Inspection") -> None:
    """Print samples, views with their shapes, sizes and progress, and their provenance."""
    console = out()
    splits = listed(f"{split} {n:,}" for split, n in inspection.splits.items())
    console.print(
        Text.assemble(("dataset ", "dim"), (inspection.dataset, "bold"), f": {inspection.rows:,} samples ({splits})"),
        soft_wrap=True,
    )
    present = listed(f"{modality} {n:,}" for modality, n in inspection.present.items())
    console.print(
        Text(f"{len(inspection.classes):,} classes; present: {present}; last extract {inspection.extracted[:19]} UTC")
    )
    views = new_table("encoder", "modality", "view", "shape", "dtype", "size", "rows", numbers=2)
    for view in inspection.views:
        shape = " x ".join(f"{n:,}" if isinstance(n, int) else n for n in view.shape)
        names = view.encoder, view.modality, view.view
        views.add_row(*names, shape, view.dtype, format_bytes(view.n_bytes), _progress(view))
    console.print(views)
    for (encoder, modality), reason in inspection.lost.items():
        console.print(Text.assemble(("missing ", "bold red"), f"{encoder} ({modality}): {reason}"), soft_wrap=True)
    for (encoder, modality), provenance in inspection.provenance.items():
        console.print()
        console.print(Text.assemble((encoder, "bold"), f" ({modality}) was made with"))
        for field, value in provenance.items():
            console.print(Text.assemble((f"  {field:<14}", "dim"), value), soft_wrap=True)
        if (long := inspection.long.get((encoder, modality))) is not None and long.message:
            console.print(Text(f"  {long.message}"), soft_wrap=True)
    console.print()
    if inspection.bad:
        console.print(
            f"{len(inspection.bad):,} bad sample{'s' * (len(inspection.bad) > 1)}; cachefuse inspect --bad lists them"
        )
    console.print(Text.assemble(("store ", "dim"), str(inspection.path)), soft_wrap=True)


def _progress(view: "StoredView") -> Text:
    done = Text("all") if view.done == view.rows else Text(f"{view.done / max(1, view.rows):.1%}", "yellow")
    if view.damaged:
        done.append(" damaged", "bold red")
    return done


def inspect_dict(inspection: "Inspection") -> JsonObject:
    return {
        "store": str(inspection.path),
        "dataset": inspection.dataset,
        "extracted": inspection.extracted,
        "rows": inspection.rows,
        "splits": inspection.splits,
        "classes": list(inspection.classes),
        "present": inspection.present,
        "views": [asdict(view) for view in inspection.views],
        "missing": [{"encoder": e, "modality": m, "reason": why} for (e, m), why in inspection.lost.items()],
        "encoders": [
            {
                "encoder": encoder,
                "modality": modality,
                "source": inspection.sources[(encoder, modality)],
                "provenance": provenance,
                "long_texts": long.to_dict() if (long := inspection.long.get((encoder, modality))) else None,
            }
            for (encoder, modality), provenance in inspection.provenance.items()
        ],
        "bad": [vars(line) for line in inspection.bad],
    }


def bad_report(inspection: "Inspection") -> None:
    """Print every bad sample with its modality, file and reason."""
    console = out()
    if not inspection.bad:
        console.print(f"{inspection.dataset} has no bad samples so far.")
        return
    listed = new_table("sample", "modality", "reason", "file")
    for line in inspection.bad:
        listed.add_row(line.id, line.modality, line.reason, line.source)
    console.print(listed)


def duplicates_report(found: "Duplicates") -> None:
    """Print how many rows of each split have copies in the same and in other splits; between splits first."""
    console = out()
    features = listed(f"{encoder} ({modality})" for modality, encoder in found.encoders.items())
    console.print(
        Text.assemble(("dataset ", "dim"), (found.dataset, "bold"), f": {found.n_rows:,} samples"), soft_wrap=True
    )
    console.print(f"near: cosine of at least {found.limit:g} by {features}, less the mean", soft_wrap=True)
    table = new_table("split", "copies in", "kind", "rows", "of", "share", "pairs", "other labels", numbers=5)
    for line in sorted(found.splits, key=lambda line: line.split == line.among):
        for kind, copies in (("exact", line.exact), ("near", line.near)):
            if copies.pairs:
                share = f"{copies.rows / line.n_rows:.1%}"
                counts = f"{copies.rows:,}", f"{line.n_rows:,}", share, f"{copies.pairs:,}", f"{copies.other_labels:,}"
                table.add_row(line.split, line.among, kind, *counts)
    if table.row_count:
        console.print(table)
    else:
        console.print(Text("There are no duplicates.", "green"))


def duplicates_dict(found: "Duplicates") -> JsonObject:
    return {
        "dataset": found.dataset,
        "rows": found.n_rows,
        "near": found.limit,
        "encoders": dict(found.encoders),
        "splits": [asdict(line) for line in found.splits],
    }


def plan_report(plan: "Plan") -> None:
    """Print rows, bytes and time per view, and whether the disk has enough space."""
    console = out()
    views = new_table("encoder", "modality", "view", "rows", "to do", "per row", "in total", "time", numbers=5)
    timed: set[tuple[str, str]] = set()
    for view in plan.views:
        key = (view.encoder, view.modality)
        time = "" if key in timed else _duration(plan.seconds[key])
        timed.add(key)
        sizes = (format_bytes(view.row_bytes), format_bytes(view.n_bytes))
        names = view.encoder, view.modality, view.view
        views.add_row(*names, f"{view.rows:,}", f"{view.pending:,}", *sizes, time)
    console.print(views)
    if any(view.pending for view in plan.views):
        total = f"{format_bytes(plan.n_bytes)} to write, {format_bytes(plan.free)} free; "
        enough = ("the disk has enough space", "green") if plan.fits else ("the disk has too little space", "bold red")
        console.print(Text.assemble(total, enough, f"; about {_duration(sum(plan.seconds.values()))}"))
        step = "cachefuse extract, with the same options"
    else:
        console.print("Nothing to compute: all features are already there.")
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


def verify_report(verification: "Verification") -> None:
    """Print the blocks and bytes read in each view, the errors of int8, and the damage."""
    console = out()
    views = new_table("encoder", "modality", "view", "blocks", "read", "NaN", "inf", "zero rows", numbers=5)
    for view in verification.views:
        blocks = f"{view.finished:,}" if view.finished == view.blocks else f"{view.finished:,}/{view.blocks:,}"
        names = view.encoder, view.modality, view.view
        views.add_row(*names, blocks, format_bytes(view.n_bytes), f"{view.nan:,}", f"{view.inf:,}", f"{view.zero:,}")
    console.print(views)
    for view in verification.views:
        if view.cosine:
            mean, least = view.cosine
            name = f"{view.encoder} ({view.modality}, {view.view})"
            console.print(f"{name}: int8, cosine to float16 {mean:.5f} on average, at least {least:.5f}")
    if verification.damage:
        _damage(verification, console)
        if any(damage.view for damage in verification.damage):
            console.print("To compute only these blocks: cachefuse verify --repair")
    else:
        console.print(Text("The store holds all that was asked for, undamaged.", "green"))
    console.print(Text.assemble(("store ", "dim"), str(verification.path)), soft_wrap=True)


def damage_report(verification: "Verification") -> None:
    """Print the damage before a repair."""
    _damage(verification, err())


def _damage(verification: "Verification", console: Console) -> None:
    for damage in verification.damage:
        names = ", ".join(name for name in (damage.modality, damage.view) if name)
        place = f"{damage.encoder} ({names})" if damage.encoder else damage.view
        block = "" if damage.block is None else f" block {damage.block}"
        word = "missing " if damage.missing else "damaged "
        console.print(Text.assemble((word, "bold red"), f"{place}{block}: {damage.reason}"), soft_wrap=True)


def verify_dict(verification: "Verification") -> JsonObject:
    return {
        "store": str(verification.path),
        "sound": not verification.damage,
        "views": [asdict(view) for view in verification.views],
        "damage": [asdict(damage) for damage in verification.damage],
    }


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 1:
        return "under 1 s" if seconds else "0 s"
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.0f} min" if minutes < 90 else f"{hours:.1f} h"
