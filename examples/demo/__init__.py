"""`make demo`: an agent repairs a small project on a server of its own."""
