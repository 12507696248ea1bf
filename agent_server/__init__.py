"""Map of the folder."""
