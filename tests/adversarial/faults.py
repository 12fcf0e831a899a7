"""Single faults of a file, by name: what a bad disk, a careless hand or an attacker may do to it."""

import os
import shutil
from pathlib import Path


def flip_bit(path, rng, _):
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def change_byte(path, rng, _):
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data))] = rng.choice(b'\x00\xff09"}{[],\n-e.AZaz')
    path.write_bytes(data)


def change_digit(path, rng, _):
    """Change a digit into another: JSON that still is JSON."""
    data = bytearray(path.read_bytes())
    digits = [i for i, byte in enumerate(data) if byte in b"0123456789"]
    if digits:
        data[rng.choice(digits)] = rng.choice(b"0123456789")
    path.write_bytes(data)


def drop_line(path, rng, _):
    lines = path.read_bytes().splitlines(keepends=True)
    if lines:
        del lines[rng.randrange(len(lines))]
    path.write_bytes(b"".join(lines))


def swap_lines(path, rng, _):
    lines = path.read_bytes().splitlines(keepends=True)
    rng.shuffle(lines)
    path.write_bytes(b"".join(lines))


def truncate(to):
    def fault(path, rng, _):
        os.truncate(path, to(path.stat().st_size, rng))

    return fault


def append(path, rng, _):
    with path.open("ab") as file:
        file.write(rng.choice([b"\0", b"\n", b"{}\n", b"x" * 4096, rng.randbytes(rng.randrange(1, 5000))]))


def zero_page(path, rng, _):
    data = bytearray(path.read_bytes())
    start = rng.randrange(max(1, len(data) // 512)) * 512
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(data)


def delete(path, rng, _):
    path.unlink()


def folder(path, rng, _):
    path.unlink()
    path.mkdir()


def fifo(path, rng, _):
    path.unlink()
    os.mkfifo(path)


def link_to(target):
    def fault(path, rng, _):
        path.unlink()
        path.symlink_to(target)

    return fault


def huge(path, rng, _):
    """A sparse file of 40 GB that begins as the file did."""
    os.truncate(path, 40_000_000_000)


def other_file(path, rng, older):
    """Another file of the same name, or of any, in the workspace."""
    (workspace,) = [parent for parent in path.parents if parent.name == "workspace"][:1]
    files = sorted(
        other for other in workspace.rglob("*") if other.is_file() and other != path and other.stat().st_size
    )
    same = [other for other in files if other.name == path.name]
    shutil.copyfile(rng.choice(same if same and rng.random() < 0.8 else files), path.with_name(".new"))
    path.with_name(".new").replace(path)


def older_version(path, rng, older):
    """The file as another training or extract of the same names left it."""
    if not older.is_file():
        return False
    shutil.copyfile(older, path)
    return None


def unreadable(path, rng, _):
    path.chmod(0)


FAULTS = {
    "bit flipped": flip_bit,
    "byte changed": change_byte,
    "digit changed": change_digit,
    "line dropped": drop_line,
    "lines swapped": swap_lines,
    "emptied": truncate(lambda n, rng: 0),
    "cut to one byte": truncate(lambda n, rng: 1),
    "cut in half": truncate(lambda n, rng: n // 2),
    "cut by one byte": truncate(lambda n, rng: max(0, n - 1)),
    "cut anywhere": truncate(lambda n, rng: rng.randrange(n + 1)),
    "bytes appended": append,
    "page zeroed": zero_page,
    "deleted": delete,
    "a folder": folder,
    "a FIFO": fifo,
    "a link to /dev/zero": link_to("/dev/zero"),
    "a dangling link": link_to("nowhere"),
    "40 GB": huge,
    "another file": other_file,
    "an older version": older_version,
    "unreadable": unreadable,
}
LINES = ("line dropped", "lines swapped")


def suits(name: str, path: Path) -> bool:
    """Whether a fault changes a file of this kind."""
    if name in LINES:
        return path.suffix == ".jsonl"
    return name != "digit changed" or path.suffix in (".json", ".jsonl")
