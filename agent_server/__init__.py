"""The process: an agent server, and the command that starts and uses one.

The server, from the network inwards:
serve:          start and end, in order            app:           HTTP server and listening socket
connection:     one network connection             frames:        WebSocket frames, before they are parsed
gate:           Host, Origin, key; errors          upgrade:       the WebSocket handshake
hosts:          the rules of Host and Origin       auth:          the API key
routes:         what is at which address           answers:       JSON over HTTP
query:          what may follow the `?` of an address
event_stream:   events as Server-Sent Events       lobby:         what all WebSockets share
session:        one WebSocket                      introduction:  `initialize`
feed:           replay, then live                  handlers:      method class to coroutine
relay:          calls to a box, once each          passage:       one of them, with its bytes
receipt:        what they answered, kept           boxes:         their starts, ends and survival
box_link:       the way to one of them             box_name:      what it is called, and promised
box_watch:      whether it answers at all          box_place:     where an agent's tools act
conversations:  all conversations
hosted:         one of them, in memory             client_tools:  tools in the client's process
metrics:        numbers for Prometheus             work:          what runs now; draining
sealing:        the keys that seal secrets         config:        every option
config_sources: where options are set
data_folder:    where things last, and its lock    refusal:       why a server does not start
logs:           log lines without secrets          sandbox_rules: which sandboxes clients may have
retention:      which conversations go by themselves note:          what is kept of all of them in memory

Servers for others, started on request:
runtime_api:    the Runtime API, as a whole        runtime_config: what it is told
runtime_routes: what is at which address           runtime_proxy: the way to a runtime
runtimes:       all of them                        runtime:       one of them
pods:           what they run in                   pods_process:  processes, without an engine
pods_docker:    containers                         tenants:       who may have what
tunnel:        two connections joined

The command line:
__main__, cli, arguments: what was typed           commands:      one file per command
client, places: servers and workspaces to use      terminal, viewer, transcript, inlet, outlet: what a person sees
check, engine_check: what doctor looks at
"""
