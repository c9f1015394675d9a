"""Runs on small disks of their own: python disk_child.py KIND RECIPE FOLDER [KIB ...], where it may mount.

Each disk is a tmpfs below FOLDER. Prints, as JSON, what the runs did there:
  full         for each size in KiB: a run until the disk is full; then more room, and the same command again
  read-only    one disk that refuses all writing
"""

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from corelora.errors import CoreLoraError
from corelora.recipe import Recipe, load_recipe
from corelora.train import run
from corelora.train.checkpoints import newest_whole
from corelora.train.run import train

torch.set_num_threads(1)
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000  # of linux/sched.h


def part_from_the_system():
    """Be root in a namespace of users and mounts of its own, as in `unshare -Urm`."""
    user, group = os.getuid(), os.getgid()
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def mount(folder, options):
    """Mount a disk, or mount it again with other options."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def attempt(recipe, folder):
    """The error that a run ends with, or None."""
    try:
        train(recipe, folder)
    except CoreLoraError as error:
        return f"{error} <- {error.__cause__!r}"
    return None


def full(recipe, folder, size):
    """A disk that fills up in mid-run."""
    mount(folder, f"size={size}k")
    error = attempt(recipe, folder)
    whole = newest_whole(folder / "checkpoints")
    left = [p.name for p in (folder / "checkpoints").iterdir()]
    mount(folder, "remount,size=16m")
    again = attempt(recipe, folder)
    weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return {
        "error": error,
        "kept": whole.step if whole else 0,
        "left": left,
        "again": again,
        "weights": hashlib.sha256(weights).hexdigest(),
        "metrics": (folder / "metrics.jsonl").read_text(),
    }


def read_only(recipe, folder):
    """A disk that refuses; the model must not even be loaded."""
    mount(folder, "ro")
    loaded = []
    run.load_model = lambda *args: loaded.append(args)
    return {"error": attempt(recipe, folder), "loaded": len(loaded)}


if __name__ == "__main__":
    part_from_the_system()
    recipe, folder = load_recipe(Recipe, sys.argv[2]), Path(sys.argv[3])
    if sys.argv[1] == "full":
        print(json.dumps([full(recipe, folder / size, size) for size in sys.argv[4:]]))
    else:
        print(json.dumps(read_only(recipe, folder / "disk")))
