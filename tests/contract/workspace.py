"""What every workspace promises, wherever it is: one suite for all implementations.

A subclass provides the fixture `workspace`: an entered workspace in an empty folder, where bash, git
and the usual tools are installed. The suite uses nothing but the contract and `tmp_path`.

It is kept in full here, over memory and over the WebSocket of a server. A subclass for one more place is marked
`elsewhere`: tried there is what is marked `place`, because it depends on processes, users, files, limits or links;
`make test-all` tries the rest there, too.
"""

import pytest

from tests.contract.commands import CommandContract
from tests.contract.confinement import ConfinementContract
from tests.contract.files import FileContract
from tests.contract.processes import ProcessContract
from tests.contract.repeats import RepeatContract
from tests.contract.repository import RepositoryContract
from tests.contract.shells import ShellContract
from tests.contract.transfers import TransferContract


class OpenWorkspaceContract(
    CommandContract,
    ProcessContract,
    ShellContract,
    FileContract,
    TransferContract,
    RepositoryContract,
    RepeatContract,
):
    """Subclass it and provide a `workspace` fixture: where paths may lead to all files, as in a container."""

    @pytest.mark.place
    async def test_a_workspace_says_what_and_where_it_is(self, workspace):
        info = await workspace.describe()
        assert info.root.startswith("/")
        assert info.working_dir.startswith(info.root)
        assert (await workspace.execute("id -u")).stdout.strip() == str(info.user)


class WorkspaceContract(OpenWorkspaceContract, ConfinementContract):
    """The same for a workspace that is a folder, and keeps all paths in it."""
