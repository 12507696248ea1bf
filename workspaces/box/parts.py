"""What the container of a box is put together from: command, mounts, and what commands know of their user."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from agent_sdk.protocol.specs import Sandbox
from workspaces.backend.docker.accounts import Accounts
from workspaces.backend.docker.images import Image
from workspaces.backend.docker.profiles import (
    ENVIRONMENT,
    FOLDER,
    HOSTNAME,
    OUTPUT,
    RUNTIME,
    WORKSPACE,
    Bind,
    Parts,
)
from workspaces.box.folder import READY
from workspaces.box.site import Places


def box_parts(
    image: Image,
    accounts: Accounts,
    temporary: Iterable[tuple[str, str]],
    spec: Sandbox,
    places: Places,
    *,
    command: Sequence[str],
    linger: float,
    labels: dict[str, str],
    runtime: str,
    storage: dict[str, str],
) -> Parts:
    """Return the parts of a container.

    Args:
        image: of the container.
        accounts: its users.
        temporary: folders that do not last, and where each of them is in the container.
        spec: what was asked for.
        places: what lasts, and what is ours.
        command: how a box is started; its options follow.
        linger: seconds it goes on without any connection.
        labels: of the container.
        runtime: of the engine.
        storage: options for the root.
    """
    is_task = spec.profile == "task"
    begin = (image.working_dir or "/") if is_task else WORKSPACE
    options = ["--folder", FOLDER, "--root", "/", "--working-dir", begin, "--spool", OUTPUT]
    if is_task:
        options += ["--user", spec.user or image.user or "root"]
    options += ["--linger", str(linger), "--ready", f"{FOLDER}/{READY}", "--seccomp", "--init"]
    own = [(places.workspace, WORKSPACE), (places.folder, FOLDER), (places.output, OUTPUT), *temporary]
    fixed = [(places.runtime, RUNTIME)]
    targets = {target for _, target in own}
    fixed += [(f"{places.etc}/{number}", target) for number, (target, _) in enumerate(accounts.files)]
    return Parts(
        image=image.id,
        image_environment=tuple(line.split("=", 1)[0] for line in image.env),
        command=(*command, *options),
        binds=(
            *(Bind(source, target, propagation=places.propagation) for source, target in own),
            *(
                Bind(source, target, read_only=True, propagation=places.propagation)
                for source, target in fixed
            ),
            *map(_mount, spec.mounts),
        ),
        labels=labels,
        runtime=runtime,
        working_dir=begin,
        volumes=tuple(each for each in image.volumes if each not in targets) if is_task else (),
        storage=storage,
    )


def command_environment(image: Image, accounts: Accounts, spec: Sandbox) -> dict[str, str]:
    """Return what all commands find in their environment: what the image says, and who they are.

    Git takes its address from there as long as nobody has configured one. The box of a task finds the rest itself.
    """
    of_image = dict(line.split("=", 1) for line in image.env if "=" in line)
    usual = {name: value for name, value in ENVIRONMENT.items() if name != "HOME"}
    name = accounts.name
    if spec.profile == "task":
        return {**usual, **of_image, "EMAIL": f"{spec.user or name}@{HOSTNAME}"}
    own = {"HOME": WORKSPACE, "USER": name, "LOGNAME": name, "EMAIL": f"{name}@{HOSTNAME}"}
    return {**usual, **of_image, **own}


def _mount(mount: str) -> Bind:
    source, target, *options = mount.split(":")
    return Bind(source, target, read_only="ro" in options)
