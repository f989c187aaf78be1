#!/usr/bin/env python3
"""Draws the pictures that explain: `python docs/pictures.py`, a minute.

    python docs/pictures.py derivative compilers    # only these

They go to docs/pages/images/. Each has a file in docs/explained/. The pictures of findings are
those of docs/gallery.py.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import jax

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))  # they read programs

from explained.averaged_over import averaged_over
from explained.choosing import choosing
from explained.compilers import compilers
from explained.derivative import derivative
from explained.far_from_zero import far_from_zero
from explained.running_lag import running_lag
from explained.scale_invariance import scale_invariance
from explained.style import set_up
from explained.sync_on_a_mesh import DEVICES, sync_on_a_mesh

IMAGES = pathlib.Path(__file__).parent / "pages" / "images"
PICTURES = {
    draw.__name__: draw
    for draw in (
        far_from_zero,
        averaged_over,
        choosing,
        derivative,
        scale_invariance,
        running_lag,
        sync_on_a_mesh,
        compilers,
    )
}


def main() -> None:
    """Draws those that are asked for, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)} (default: all)"
    )
    parser.add_argument("--out", type=pathlib.Path, default=IMAGES, metavar="FOLDER")
    options = parser.parse_args()
    if unknown := set(options.names) - set(PICTURES):
        parser.error(f"no such picture: {', '.join(sorted(unknown))}")
    jax.config.update("jax_num_cpu_devices", DEVICES)  # of the mesh, simulated
    set_up()
    for name in options.names or PICTURES:
        path = options.out / f"{name}.svg"
        PICTURES[name]().savefig(path, metadata={"Date": None})
        print(f"Written to {path}")


if __name__ == "__main__":
    main()
