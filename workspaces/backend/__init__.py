"""Where machines run: on the container engine, or as processes that outlive whoever started them.

Knows engines and processes; nothing of boxes and servers, which are built from it.

contract:      what a machine is, and what every backend promises of it
labels:        how what is ours is known
docker:        machines that are containers
process:       machines that are processes
disks:         folders with a limit where this machine can make one, and copies of them
sandbox_files: folders that belong to the user of sandboxes, and the programs that handle them
sweep:         what removes the machines that nobody owns any more
records:       processes that outlive whoever started them, and what is written down so that they are found
"""
