"""terminal: a persistent bash. Folder, variables, functions and background jobs stay from call to call.

A command that runs on is not killed: the call returns after a while and says how to wait, to type into
it or to stop it. The shell itself lives in the workspace and outlives this object. What is typed may name keys
(`C-c`, `Up`); `keystroke` says what a terminal sends for one.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from codecs import getincrementaldecoder
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any

from msgspec import Meta, Struct

from agent_sdk.agent.history import MODEL_CHARS
from agent_sdk.agent.tools.screen import plain
from agent_sdk.ids import sha256
from agent_sdk.protocol.errors import AgentServerError, OutcomeUnknown, ToolError
from agent_sdk.protocol.specs import ToolSpec
from agent_sdk.tools import HidePart, Resumable, ToolContext, ToolResult, decode_arguments, parameters_of
from agent_sdk.workspace.contract import Shell, ShellResult

_NAMED = {
    "ENTER": b"\r",
    "TAB": b"\t",
    "ESC": b"\x1b",
    "ESCAPE": b"\x1b",
    "SPACE": b" ",
    "BS": b"\x7f",
    "BSPACE": b"\x7f",
    "BACKSPACE": b"\x7f",
    "UP": b"\x1b[A",
    "DOWN": b"\x1b[B",
    "RIGHT": b"\x1b[C",
    "LEFT": b"\x1b[D",
    "HOME": b"\x1b[H",
    "END": b"\x1b[F",
    "PGUP": b"\x1b[5~",
    "PGDN": b"\x1b[6~",
    "DEL": b"\x1b[3~",
    "DELETE": b"\x1b[3~",
}
_CONTROL = re.compile(r"C-([A-Za-z@\[\\\]^_])\Z")


def keystroke(text: str) -> bytes | None:
    """Return what a terminal sends for a named key (`C-c`, `UP`, `ENTER`, …); None: the text names none."""
    control = _CONTROL.match(text)
    if control:
        return bytes([ord(control[1].upper()) & 0x1F])
    return _NAMED.get(text.upper()) if text in (text.upper(), text.capitalize()) else None


QUIET_SECONDS = 30.0
"""Without new output until the call returns, when no timeout is given."""
LONGEST_SECONDS = 600.0
"""Until the call returns although output goes on, when no timeout is given."""
MOMENT_SECONDS = 0.001
"""Long enough to ask a shell whether its command still runs."""
_NOTE_CHARS = 600
"""Room for the line that says what is left out, with the path of a file."""
_CONTINUATIONS = bytes(range(0x80, 0xC0))

_DESCRIPTION = """\
Run a command in a bash that stays open: the folder, variables, functions and background jobs are still there in the
next call. Several lines, pipes, loops and here-documents are fine.

- The result ends with the exit code and the folder you are in.
- A command that says nothing for 30 seconds is left running and the call returns. Then: an empty command waits on and
  shows new output; is_input=true with text types it, exactly, with a newline at its end for Enter; without one Enter
  is pressed as well where the program reads lines, and not after a single key for one that asks for keys. enter=true
  and enter=false decide that. is_input=true with a key name presses that key alone: C-c stops the command, C-d ends
  its input, C-z suspends it, UP, DOWN, LEFT, RIGHT, TAB, ENTER and ESC work, too.
- While a command runs no other one can be started.
- timeout: seconds to wait at most, for commands that are known to be long or to ask something. They go on afterwards.
- Long output is cut in its middle; the whole is in the file that is named there.
- Start servers in the background with their output in a file: `server > server.log 2>&1 &`.
- reset=true ends the shell with all it runs and opens a fresh one; the command, if there is one, runs there."""

_HOW_TO_GO_ON = (
    "an empty command waits on; is_input=true with text types into it; is_input=true with C-c stops it; "
    "a longer timeout in the next call waits longer"
)


class TerminalArguments(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the model may say."""

    command: Annotated[
        str, Meta(description="Bash text; or, with is_input, text or a key for the running one.")
    ] = ""
    is_input: Annotated[bool, Meta(description="The command is input for the running program.")] = False
    enter: (
        Annotated[bool, Meta(description="With is_input: whether Enter is pressed after the text.")] | None
    ) = None
    timeout: Annotated[float, Meta(gt=0, le=86_400, description="Seconds to wait at most.")] | None = None
    reset: Annotated[bool, Meta(description="Open a fresh shell first.")] = False


class TerminalTool(Resumable):
    """One per conversation; its shell has the conversation's name."""

    def __init__(self, conversation: str) -> None:
        self.spec = ToolSpec(
            name="terminal", description=_DESCRIPTION, parameters=parameters_of(TerminalArguments)
        )
        self._shell_name = conversation
        self._exported: Mapping[str, str] = {}
        self._running = False
        """The last call left a command running."""

    async def run(self, arguments: str, context: ToolContext) -> ToolResult:
        """Run a command. Cancelling sends ^C to it; one that does not care is ended with its shell.

        It runs on where another process goes on with the call.
        """
        return await self._carry_out(arguments, context, begun=False)

    async def resume(self, arguments: str, context: ToolContext) -> ToolResult:
        """Take up a command. The shell's op_ids come from the call, so that the workspace knows what it has begun.

        New secrets are left to the next call: the shell may be busy with this one.
        """
        if not context.same_place:
            raise OutcomeUnknown("the shell in which the call ran is gone")
        return await self._carry_out(arguments, context, begun=True)

    async def _carry_out(self, arguments: str, context: ToolContext, *, begun: bool) -> ToolResult:
        wanted: TerminalArguments = decode_arguments(arguments, TerminalArguments)
        if wanted.reset and wanted.is_input:
            raise ToolError("reset and is_input exclude each other: a fresh shell has nothing to type into")
        shell = context.workspace.shell(self._shell_name)
        if wanted.reset:
            await shell.reset(op_id=_op_id(context, "reset"))
            self._exported, self._running = {}, False
            if not wanted.command.strip():
                return ToolResult(text="[A fresh shell is open.]", data={"status": "done"})
        limits: dict[str, Any] = {"timeout": wanted.timeout, "quiet": None}
        if wanted.timeout is None:
            limits = {"timeout": LONGEST_SECONDS, "quiet": QUIET_SECONDS}
        if wanted.is_input or not wanted.command.strip():
            keys, enter = _typed(wanted)
            result = await shell.send(keys, enter=enter, **limits, op_id=_op_id(context, "send"))
            if result.status == "done" and not self._running and not begun:
                text = "No command is running, so nothing was typed." if keys else "No command is running."
                return ToolResult(text=f"[{text}]", is_error=True, data={"status": "done", "cwd": result.cwd})
        else:
            if not begun:
                await self._export(shell, context.secrets)
            result = await self._run(shell, wanted.command, limits, context)
        goes_on = self._running or wanted.is_input or not wanted.command.strip() or result.status == "busy"
        self._running = result.status in ("quiet", "timeout", "busy")
        if result.status == "ended":
            self._exported = {}
        return _told(result, wanted, goes_on, context.part)

    async def _run(
        self, shell: Shell, command: str, limits: dict[str, Any], context: ToolContext
    ) -> ShellResult:
        try:
            return await shell.run(command, **limits, op_id=_op_id(context, "run"))
        except asyncio.CancelledError:
            if not context.leaving():
                with suppress(AgentServerError):  # the place may be gone, too
                    await self._clear(shell)
            raise

    async def abandon(self, arguments: str, context: ToolContext) -> None:
        await self._clear(context.workspace.shell(self._shell_name))

    async def _clear(self, shell: Shell) -> None:
        """End a command that still runs, with its shell."""
        left = await shell.send(b"", timeout=MOMENT_SECONDS, quiet=None)
        if left.status == "timeout":
            await shell.reset()
            self._exported = {}

    async def _export(self, shell: Shell, secrets: Mapping[str, str]) -> None:
        """Bring new secrets into the shell; while a command runs that has to wait for the next one."""
        fresh = {name: value for name, value in secrets.items() if self._exported.get(name) != value}
        if not fresh:
            return
        words = " ".join(f"{name}={shlex.quote(value)}" for name, value in fresh.items())
        # The space keeps it out of a history that somebody may have switched on.
        result = await shell.run(f" export {words}", timeout=QUIET_SECONDS, quiet=None)
        if result.status == "done":
            self._exported = {**self._exported, **fresh}


def _op_id(context: ToolContext, step: str) -> str | None:
    """The same for the same step of the same call, in whatever process; a UUID of version 8."""
    if not context.call_key:
        return None
    digest = sha256()
    digest.update(f"{context.call_key} {step}".encode())
    text = digest.hexdigest()
    return f"{text[:8]}-{text[8:12]}-8{text[13:16]}-a{text[17:20]}-{text[20:32]}"


def _typed(wanted: TerminalArguments) -> tuple[bytes, bool | None]:
    """Return what to type, and whether to press Enter after it (None: as the program reads)."""
    if not wanted.is_input or not wanted.command:
        return b"", bool(wanted.enter)
    key = keystroke(wanted.command)
    if key is not None:
        return key, bool(wanted.enter)
    return wanted.command.encode(errors="surrogateescape"), wanted.enter


def _told(result: ShellResult, wanted: TerminalArguments, goes_on: bool, part: HidePart) -> ToolResult:
    """The result in words for the model and facts for programs. Its output `goes_on` with what a call showed before."""
    told = [f"[{result.reason}]"] if result.reason else []
    notes = "\n".join([*told, *_notes(result, wanted)])
    text, cut = _shown(result, MODEL_CHARS - len(notes) - 1, goes_on, part)
    data: dict[str, Any] = {"exit_code": result.exit_code, "cwd": result.cwd, "status": result.status}
    if result.full_output:
        data["full_output"] = result.full_output
    return ToolResult(text="\n".join(part for part in (text, notes) if part), data=data, bytes_cut=cut)


def _shown(result: ShellResult, limit: int, goes_on: bool, part: HidePart) -> tuple[str, int]:
    """What was printed as a reader would see it, in at most `limit` characters, and how many bytes are left out."""
    # What a call has of a secret whose rest is in the output of the call before or after is not shown either.
    output, runs_on = result.output, result.status != "done"
    if not output.omitted and len(text := plain(output.text).rstrip()) <= limit:
        return part(text, begun=goes_on, cut=runs_on), 0
    half = (limit - _NOTE_CHARS) // 2
    printed = output.head + output.tail
    head = _whole_characters(printed[:half])
    tail = printed[-half:].lstrip(_CONTINUATIONS)
    cut = output.size - len(head) - len(tail)
    where = f"; the whole output is in {result.full_output}" if result.full_output else ""
    if result.full_output_lacks:
        where = f"; all but {result.full_output_lacks} bytes of the output are in {result.full_output}"
    first, last = (plain(end.decode(errors="replace")) for end in (head, tail))
    first, last = part(first, begun=goes_on, cut=True), part(last.rstrip(), begun=True, cut=runs_on)
    return f"{first}\n[... {cut} bytes left out{where} ...]\n{last}", cut


def _whole_characters(data: bytes) -> bytes:
    """Leave out the beginning of a character whose rest is cut off."""
    decoder = getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return data[: len(data) - len(decoder.getstate()[0])]


def _notes(result: ShellResult, wanted: TerminalArguments) -> list[str]:
    match result.status:
        case "quiet":
            return [
                f"[The command has said nothing for {QUIET_SECONDS:.0f} seconds and runs on: {_HOW_TO_GO_ON}.]"
            ]
        case "timeout":
            seconds = wanted.timeout or LONGEST_SECONDS
            return [f"[The command still runs after {seconds:g} seconds: {_HOW_TO_GO_ON}.]"]
        case "busy":
            return [
                f"[Your command was NOT run: the one before it still runs. To go on with that one: {_HOW_TO_GO_ON}; "
                "reset=true ends it with the whole shell.]"
            ]
        case "unknown":
            return ["[The place where it ran was lost; whether the command was done is unknown: look first.]"]
        case "ended":
            code = "" if result.exit_code is None else f" with exit code {result.exit_code}"
            return [
                f"[The shell itself ended{code}; a fresh one is open.]",
                f"[Current folder: {result.cwd}]",
            ]
        case _:
            return [
                f"[The command completed with exit code {result.exit_code}.]",
                f"[Current working directory: {result.cwd}]",
            ]
