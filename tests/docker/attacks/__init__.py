"""A program that attacks the machine below it; see `__main__`."""
