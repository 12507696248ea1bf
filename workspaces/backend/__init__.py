"""Where things are run: the container engine, and processes that outlive whoever started them.

Knows engines and processes; nothing of boxes, which are built from it.

docker:  containers
child:   a process that may outlive whoever started it
records: what is written down so that a later process finds it
"""
