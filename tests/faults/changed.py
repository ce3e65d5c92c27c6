"""``train.py`` whose data (``CHANGED=train.json``) or index (``CHANGED=text.npy``) changes once it is opened."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vtprune_train.cli import train_main
from vtprune_train.training.loop import run


def edit(path, old, new):
    """Other bytes of the same size, under the old time."""
    state, content = path.stat(), path.read_bytes()
    assert len(old) == len(new) and old in content
    path.write_bytes(content.replace(old, new))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)


def zero_body(path):
    """All values of a column; its header stays, and so does its size. The rows of a selection have no header."""
    header = 128 if path.suffix == ".npy" else 0
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(header)
        file.write(bytes(size - header))


def main():
    real = run.build_planner

    def changing(config, collate, world_size):
        selection, changed = collate.index.selections[0], os.environ["CHANGED"]
        if changed == "train.json":
            edit(Path(selection.table.manifest["files"][0][0]), b"how bright", b"HOW bright")
        else:
            zero_body((selection.folder if changed == "rows.bin" else selection.table.folder) / changed)
        return real(config, collate, world_size)

    run.build_planner = changing
    return train_main()


if __name__ == "__main__":
    sys.exit(main())
