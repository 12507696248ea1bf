"""Break the product on purpose, record what everybody saw, and let one checker judge it.

* seed: one number decides everything that is random; what a run may cost (its tier).
* history: what clients did and saw, as JSON lines.
* checker: the eight rules, over histories and the final log.
* client: writers and subscribers on the bare wire, which come back after every loss.
* server: the server as its users start it, and the signals that hit it.
* storm: eight writers and eight subscribers on four conversations.
* proxy: a TCP proxy that cuts, slices, delays, holds and refuses.
* syscalls: system calls that fail or kill.
* disk: file systems of their own: small ones, and ones whose power fails.
* witness: a client in a process of its own, that can be frozen.
* broken: the mutants, damaged builds that the checker must catch.

`make chaos` runs the tests; `python -m tests.chaos FOLDER` judges a kept run again.
"""
