"""file_editor: looking at files and changing them by exact text. Knows files only through Workspace.files.

Of a file nothing changes but what is asked for: encoding, byte order mark and line ends stay.
"""

from __future__ import annotations

import codecs
import posixpath
from collections import OrderedDict, deque
from typing import Annotated, Literal

from msgspec import Meta, Struct

from agent_sdk.agent.mask import ELLIPSIS
from agent_sdk.protocol.errors import AgentServerError, IsADirectory, PathNotFound, ToolError
from agent_sdk.protocol.specs import ToolSpec
from agent_sdk.tools import ToolContext, ToolResult, decode_arguments, parameters_of
from agent_sdk.workspace.contract import Workspace

LOOKED_AT = 8 << 10
"""Bytes at the beginning that tell text from something else."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_NOT_IN_TEXT = bytes(sorted({*range(0x20), 0x7F} - {*b"\b\t\n\f\r\x1b"}))


class TextFile(Struct, frozen=True):
    """A decoded file."""

    text: str
    """With `\\n` for every line end when the file uses CRLF throughout, else as it is."""
    encoding: str = "utf-8"
    mark: bytes = b""
    """The byte order mark."""
    crlf: bool = False
    """Every line ends with CRLF."""

    @property
    def lines(self) -> list[str]:
        """Without their ends; an end at the end of the file begins no further line."""
        lines = self.text.split("\n")
        return lines[:-1] if lines[-1] == "" else lines


def decode_text(data: bytes) -> TextFile | None:
    """Return the text of a file: UTF-8, UTF-16 with a mark, else Latin-1; None when it is no text."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return _of(data[len(mark) :].decode(encoding), encoding, mark)
            except UnicodeDecodeError:
                return None
    beginning = data[:LOOKED_AT]
    strange = len(beginning) - len(beginning.translate(None, _NOT_IN_TEXT))
    if b"\0" in data or strange * 10 > len(beginning):
        return None
    try:
        return _of(data.decode(), "utf-8")
    except UnicodeDecodeError:
        return _of(data.decode("latin-1"), "latin-1")


def encode_text(file: TextFile, text: str) -> bytes:
    """Return the bytes of a new text for this file.

    Raises:
        ToolError: the file's encoding has no way to say a character.
    """
    if file.crlf:
        text = text.replace("\n", "\r\n")
    try:
        return file.mark + text.encode(file.encoding)
    except UnicodeEncodeError as exc:
        character = text[exc.start]
        raise ToolError(
            f"new_str: the file is {file.encoding} and cannot hold {character!r}; "
            "convert the file with the terminal first (iconv), or do without the character"
        ) from None


def _of(text: str, encoding: str, mark: bytes = b"") -> TextFile:
    ends = text.count("\r\n")
    crlf = 0 < ends == text.count("\n")
    return TextFile(text.replace("\r\n", "\n") if crlf else text, encoding, mark, crlf)


LARGEST_BYTES = 10 << 20
VIEW_CHARS = 16_000
SNIPPET_LINES = 4
LINES_NAMED = 20

_DESCRIPTION = """\
Look at files and change them. Paths are absolute, or relative to the working folder.

- view: a text file with line numbers (view_range=[first, last] for a part, last=-1 for the end), or what is in a
  folder, two levels deep.
- create: a new file with file_text; folders are made. An existing file is not overwritten.
- str_replace: put new_str in place of old_str. old_str has to be in the file exactly once, with the same white space;
  take enough lines around it to make it unique. Without new_str it is removed.
- insert: put new_str after line insert_line (0: at the top).
- undo_edit: take back the last change made to a file with this tool, up to ten times.

Encoding and line ends of a file stay as they are. View a file before you change it."""

KEPT_PER_FILE = 10
KEPT_BYTES = 64 << 20
"""Of all files together; beyond it the file that was edited longest ago is forgotten."""


class FileEditorArguments(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the model may say."""

    command: Literal["view", "create", "str_replace", "insert", "undo_edit"]
    path: Annotated[str, Meta(min_length=1, max_length=4096, description="Of the file, or a folder to view.")]
    file_text: Annotated[str, Meta(description="create: the content.")] | None = None
    old_str: Annotated[str, Meta(description="str_replace: text that is in the file once.")] | None = None
    new_str: Annotated[str, Meta(description="str_replace, insert: the new text.")] | None = None
    insert_line: Annotated[int, Meta(ge=0, description="insert: the line it goes after.")] | None = None
    view_range: (
        Annotated[list[int], Meta(min_length=2, max_length=2, description="view: first and last line.")]
        | None
    ) = None


class FileEditorTool:
    """One per conversation: it remembers what it changed."""

    def __init__(self) -> None:
        self.spec = ToolSpec(
            name="file_editor", description=_DESCRIPTION, parameters=parameters_of(FileEditorArguments)
        )
        self._undo = Undo()
        self._folder: str | None = None

    async def run(self, arguments: str, context: ToolContext) -> ToolResult:
        """Run one command on a file; raises as Tool.run says."""
        wanted: FileEditorArguments = decode_arguments(arguments, FileEditorArguments)
        workspace = context.workspace
        if self._folder is None:
            self._folder = (await workspace.describe()).working_dir
        path = posixpath.normpath(posixpath.join(self._folder, wanted.path))
        match wanted.command:
            case "view":
                return await self._view(workspace, path, wanted)
            case "create":
                return await self._create(workspace, path, wanted)
            case "str_replace":
                return await self._str_replace(workspace, path, wanted)
            case "insert":
                return await self._insert(workspace, path, wanted)
            case "undo_edit":
                return await self._undo_edit(workspace, path)

    async def _view(self, workspace: Workspace, path: str, wanted: FileEditorArguments) -> ToolResult:
        try:
            _, file = await self._read(workspace, path)
        except IsADirectory:
            if wanted.view_range is not None:
                raise ToolError(f"view_range: {path} is a folder and has no lines") from None
            return await _folder(workspace, path)
        lines = file.lines
        first, last = _range(wanted.view_range, len(lines))
        text = _clipped(_numbered(lines[first - 1 : last], first), first, len(lines))
        head = f"{path} (lines {first} to {last} of {len(lines)})" if wanted.view_range else path
        return _told("view", path, f"{head}\n{text}" if lines else f"{path} is empty.")

    async def _create(self, workspace: Workspace, path: str, wanted: FileEditorArguments) -> ToolResult:
        if wanted.file_text is None:
            raise ToolError("file_text: create needs it; an empty text makes an empty file")
        try:
            found = await workspace.files.stat(path)
        except PathNotFound:
            pass
        else:
            if found.type == "symlink" and await _leads_nowhere(workspace, path):
                # What it points to is made; to take that back does not take the link away.
                return await self._create(
                    workspace, posixpath.join(posixpath.dirname(path), found.target or ""), wanted
                )
            kind = "a folder" if found.type == "dir" else "a file"
            raise ToolError(f"path: {path} is {kind} already; change it with str_replace or insert")
        await workspace.files.write(path, wanted.file_text.encode())
        self._undo.remember(path, None)
        return _told("create", path, f"Created {path}.")

    async def _str_replace(self, workspace: Workspace, path: str, wanted: FileEditorArguments) -> ToolResult:
        if not wanted.old_str:
            raise ToolError("old_str: str_replace needs a text to look for; use insert to add lines")
        new = wanted.new_str or ""
        if wanted.old_str == new:
            raise ToolError("new_str: it is the same as old_str, so nothing would change")
        before, file = await self._read(workspace, path)
        start, old, new = _found(file, wanted.old_str, new)
        text = file.text[:start] + new + file.text[start + len(old) :]
        first = file.text.count("\n", 0, start)
        return await self._save(workspace, path, "str_replace", (before, file), text, first, new.count("\n"))

    async def _insert(self, workspace: Workspace, path: str, wanted: FileEditorArguments) -> ToolResult:
        if wanted.insert_line is None:
            raise ToolError("insert_line: insert needs it; 0 is the top of the file")
        if wanted.new_str is None:
            raise ToolError("new_str: insert needs the text to put in")
        before, file = await self._read(workspace, path)
        lines = file.lines
        if wanted.insert_line > len(lines):
            raise ToolError(f"insert_line: {wanted.insert_line} is beyond the file's {len(lines)} lines")
        new = wanted.new_str.replace("\r\n", "\n") if file.crlf else wanted.new_str
        start = sum(len(line) + 1 for line in lines[: wanted.insert_line])
        if start > len(file.text):  # after a last line without an end: the new text has none either
            text = f"{file.text}\n{new.removesuffix(chr(10))}"
        else:
            text = file.text[:start] + new.removesuffix("\n") + "\n" + file.text[start:]
        added = new.removesuffix("\n").count("\n")
        return await self._save(workspace, path, "insert", (before, file), text, wanted.insert_line, added)

    async def _undo_edit(self, workspace: Workspace, path: str) -> ToolResult:
        state = self._undo.take(path)
        if state is None:
            raise ToolError(f"path: there is no change of {path} to take back")
        (data,) = state
        if data is None:
            await workspace.files.remove(path)
            return _told("undo_edit", path, f"Took back the creation of {path}; the file is gone.")
        await workspace.files.write(path, data)
        return _told("undo_edit", path, f"Took back the last change of {path}.")

    async def _read(self, workspace: Workspace, path: str) -> tuple[bytes, TextFile]:
        try:
            data = await workspace.files.read(path, limit=LARGEST_BYTES + 1)
        except PathNotFound:
            raise ToolError(
                f"path: there is no {path}; look with view on its folder, or use create"
            ) from None
        if len(data) > LARGEST_BYTES:
            raise ToolError(f"path: {path} is larger than 10 MiB; look at parts of it with the terminal")
        file = decode_text(data)
        if file is None:
            raise ToolError(f"path: {path} is no text file; look at it with a program in the terminal")
        return data, file

    async def _save(
        self,
        workspace: Workspace,
        path: str,
        command: str,
        before: tuple[bytes, TextFile],
        text: str,
        first: int,
        added: int,
    ) -> ToolResult:
        """Write the new text and show its lines `first` (from 0) to `first + added` with some around them."""
        data, file = before
        await workspace.files.write(path, encode_text(file, text))
        self._undo.remember(path, data)
        lines = TextFile(text).lines
        start = max(0, first - SNIPPET_LINES)
        shown = lines[start : first + added + 1 + SNIPPET_LINES]
        snippet = _clipped(_numbered(shown, start + 1), start + 1, len(lines))
        note = "Check that it is what you meant."
        return _told(command, path, f"Changed {path}. Now it reads:\n{snippet}\n{note}")


async def _leads_nowhere(workspace: Workspace, path: str) -> bool:
    """Whether what a symlink points to does not exist."""
    try:
        await workspace.files.read(path, limit=1)
    except PathNotFound:
        return True
    except AgentServerError:  # it is a folder, or may not be read
        return False
    return False


def _found(file: TextFile, old: str, new: str) -> tuple[int, str, str]:
    """Where the text to replace is, as it stands in the file, and what to put there in the file's own line ends."""
    if file.crlf:
        old, new = old.replace("\r\n", "\n"), new.replace("\r\n", "\n")
    attempts = [(old, new)]
    if "\r\n" in file.text:  # mixed line ends
        attempts.append((old.replace("\n", "\r\n"), new.replace("\n", "\r\n")))
    if old.strip() and old.strip() != old:
        attempts.append((old.strip(), new.strip()))
    for sought, replacement in attempts:
        places = _places(file.text, sought)
        if len(places) == 1:
            return places[0], sought, replacement
        if places:
            numbers = [str(file.text.count("\n", 0, place) + 1) for place in places[:LINES_NAMED]]
            more = ", …" if len(places) > LINES_NAMED else ""
            raise ToolError(
                f"old_str: it is in the file {len(places)} times, in lines {', '.join(numbers)}{more}; "
                "take more lines around the one you mean"
            )
    raise ToolError(
        "old_str: it is not in the file; view the file and copy the text exactly, white space included"
    )


def _places(text: str, sought: str) -> list[int]:
    places, at = [], text.find(sought)
    while at >= 0:
        places.append(at)
        at = text.find(sought, at + len(sought))
    return places


def _range(view_range: list[int] | None, count: int) -> tuple[int, int]:
    """First and last line to show, from 1; the last is cut to what there is."""
    if view_range is None:
        return 1, count
    first, last = view_range
    if not 1 <= first <= max(count, 1):
        raise ToolError(f"view_range: the first line is between 1 and {count}, not {first}")
    if last != -1 and last < first:
        raise ToolError(f"view_range: the last line is -1 or at least {first}, not {last}")
    return first, count if last == -1 else min(last, count)


def _numbered(lines: list[str], first: int) -> list[str]:
    return [f"{number:6}\t{line}" for number, line in enumerate(lines, first)]


def _clipped(numbered: list[str], first: int, count: int) -> str:
    """The lines as text, only as many as fit, at least the beginning of one."""
    size, shown = 0, 0
    for line in numbered:
        size += len(line) + 1
        if size > VIEW_CHARS and shown:
            break
        shown += 1
    text = "\n".join(numbered[:shown])
    if len(text) > VIEW_CHARS:
        text = (
            f"{text[:VIEW_CHARS]}{ELLIPSIS}\n[The rest of this long line is cut; see it with the terminal.]"
        )
    if shown < len(numbered):
        text += f"\n[Cut after line {first + shown - 1} of {count}; see more with view_range.]"
    return text


async def _folder(workspace: Workspace, path: str) -> ToolResult:
    entries = await workspace.files.list(path, depth=2, hidden=False)
    top = await workspace.files.list(path, depth=1, hidden=True)
    hidden = sum(posixpath.basename(entry.path).startswith(".") for entry in top)
    names = "\n".join(f"{entry.path}/" if entry.type == "dir" else entry.path for entry in entries)
    if len(names) > VIEW_CHARS:
        names = names[:VIEW_CHARS].rpartition("\n")[0]
        names += f"\n[Cut after {names.count(chr(10)) + 1} of {len(entries)} entries; view a folder in it.]"
    text = (
        f"In {path}, two levels deep, from the workspace's root:\n{names}" if names else f"{path} is empty."
    )
    if hidden:
        text += f"\n[{hidden} hidden entries are left out; `ls -a` shows them.]"
    return _told("view", path, text)


def _told(command: str, path: str, text: str) -> ToolResult:
    return ToolResult(text=text, data={"command": command, "path": path})


class Undo:
    """The last states of each file, in memory. None stands for a file that did not exist."""

    def __init__(self) -> None:
        self._states: OrderedDict[str, deque[bytes | None]] = OrderedDict()

    def remember(self, path: str, data: bytes | None) -> None:
        """Keep what a file holds before an edit."""
        self._states.setdefault(path, deque(maxlen=KEPT_PER_FILE)).append(data)
        self._states.move_to_end(path)
        while len(self._states) > 1 and self._bytes() > KEPT_BYTES:
            self._states.popitem(last=False)

    def take(self, path: str) -> tuple[bytes | None] | None:
        """Take out the last state of a file, in a tuple; None when there is none."""
        states = self._states.get(path)
        return (states.pop(),) if states else None

    def _bytes(self) -> int:
        return sum(len(data or b"") for states in self._states.values() for data in states)
