"""Small programs, in reading order; `python -m examples` runs them all."""
