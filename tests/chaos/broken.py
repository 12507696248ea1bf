"""Mutants: the product, damaged before it starts. Each must make a fault test fail, or that test proves nothing.

`python -m tests.chaos.broken serve …` with CHAOS_MUTANT=NAME. The damage is done here only.
"""

from __future__ import annotations

import os
import queue
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from agent_sdk import idempotency
from agent_sdk.ids import new_id
from agent_sdk.log import chain, database, operations, thread
from agent_sdk.rpc import lanes
from agent_sdk.workspace import process_tree
from agent_server.boxes import registry as boxes
from agent_server.cli import main as cli
from agent_server.session import subscription
from workspaces.box import process as box_process


def no_fsync() -> None:
    """A commit returns without waiting for the disk."""
    prepare = database.Database._prepare

    def careless(self: Any) -> None:
        prepare(self)
        self.rows("PRAGMA synchronous=OFF")

    database.Database._prepare = careless


def early_ack() -> None:
    """Whoever waits for a commit is answered while it is still under way."""
    submit = thread.DatabaseThread.submit

    def eager(self: Any, work: Callable[[Any], Any], *, writes: bool, **options: Any) -> Any:
        futures: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def acknowledged(database: Any) -> Any:
            result = work(database)
            if writes:
                future = futures.get()
                futures.put(future)  # a job may be done twice
                answer = future.get_loop().call_soon_threadsafe
                answer(lambda: future.done() or future.set_result(result))
                time.sleep(0.02)
            return result

        future = submit(self, acknowledged, writes=writes, **options)
        futures.put(future)
        return future

    thread.DatabaseThread.submit = eager


def no_dedupe() -> None:
    """No operation is ever remembered."""

    async def run(self: Any, call: Any, action: Callable[[], Any], *rest: Any) -> Any:
        return await action()

    idempotency.IdempotencyStore.run = run
    operations.Operations.find = lambda self, key, call: None
    insert = operations.Operations._insert

    def forgetful(self: Any, key: int, call: Any, *rest: Any) -> None:
        insert(self, key, call._replace(op_id=new_id()), *rest)

    operations.Operations._insert = forgetful


def no_proof() -> None:
    """What is read is taken for what was written: every event proves every other."""
    database.link = lambda previous, seq, body: bytes(chain.CHAIN_BYTES)


def no_resume_mark() -> None:
    """Replay ends, and live events begin, wherever it happens to be."""
    position = subscription.Subscription._position

    def forgetful(self: Any, epoch: str | None, after: int) -> None:
        position(self, epoch, after)
        self._last = max(0, self._last - 1)

    subscription.Subscription._position = forgetful


def unbounded_queue() -> None:
    """Whatever a reader does not read waits for it, without end."""
    make = lanes.Lanes.__init__

    def endless(self: Any, budget: int, *others: Any) -> None:
        make(self, 1 << 40, *others)

    lanes.Lanes.__init__ = endless


def children_kept() -> None:
    """Ending a tree of processes ends nothing."""

    async def nothing(tree: Any, **options: Any) -> None:
        return

    process_tree.end_tree = nothing
    box_process.end_tree = nothing


def boxes_ended() -> None:
    """A stop ends every box, whatever is written down for it."""

    async def end(self: Any, link: Any) -> None:
        link.awaited = False
        await link.close(keep=False)

    boxes.Boxes._stop = end


ALL = (
    *(no_fsync, early_ack, no_dedupe, no_proof, no_resume_mark, unbounded_queue, children_kept),
    boxes_ended,
)
MUTANTS = {function.__name__: function for function in ALL}


def main(arguments: Sequence[str]) -> int:
    """Damage the product, then be it."""
    MUTANTS[os.environ["CHAOS_MUTANT"]]()
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
