"""Makes the pictures of the gallery: runs its examples and shrinks their plots.

    python docs/gallery.py                        # all, each about 2 minutes on two idle cores
    python docs/gallery.py recurrent landscape    # only these
    python docs/gallery.py --finished recurrent   # uses the existing plot in results/recurrent

An example writes its files to results/NAME; pictures are in docs/pages/images.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "pages" / "images"
EXAMPLES = (
    "speedup",
    "covariate_shift",
    "landscape",
    "scale_invariance",
    "small_batch",
    "without_batch",
    "contrastive",
    "cross_batch_attention",
    "recurrent",
    "adversarial_pairs",
)
COLOURS = (256, 128, 64, 32)  # tried in order; lines with antialiasing need no more
LIMIT = 100_000  # the largest size of a picture in bytes
WIDTH = 1200  # pixels


def shrink(plot: Path, picture: Path) -> None:
    """Writes the plot with as few colours as needed to stay within the size limit."""
    with Image.open(plot) as image:
        height = round(image.height * WIDTH / image.width)
        small = image.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS)
    for colours in COLOURS:
        # Not median cut, which replaces the orange of a thin curve by the red of another curve.
        few = small.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(picture, optimize=True)
        if picture.stat().st_size <= LIMIT:
            return


def main() -> int:
    """Runs the requested examples; returns the exit status of the first one that fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(EXAMPLES)} (default: all)"
    )
    parser.add_argument("--finished", action="store_true", help="take the plots that are there")
    options = parser.parse_args()
    if unknown := set(options.names) - set(EXAMPLES):
        parser.error(f"no example of the gallery: {', '.join(sorted(unknown))}")
    for name in options.names or EXAMPLES:
        out = ROOT / "results" / name
        if not options.finished:
            command = [sys.executable, ROOT / "examples" / f"{name}.py", "--out", out]
            if status := subprocess.run(command, check=False).returncode:
                return status
        picture = IMAGES / f"{name}.png"
        shrink(out / f"{name}.png", picture)
        print(f"{picture.relative_to(ROOT)}: {picture.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
