import sys
from pathlib import Path

# As for `python examples/speedup.py`, which has its own folder on the path.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
