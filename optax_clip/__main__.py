"""`python -m optax_clip norms.csv` suggests a threshold for recorded norms. See `optax_clip/tools/command.py`."""

from optax_clip.tools.command import main

if __name__ == "__main__":
    raise SystemExit(main())
