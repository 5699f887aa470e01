"""The embedded stack: nats-server, an S3 server and the three services as child processes on the loopback interface.

Nothing outlives the process that started it, and every port is one that the OS chose. `vidgen run` and `vidgen up`
stand on it, and the tests take their real servers from here.
"""

from vidgen.local.process import LocalError
from vidgen.local.servers import NatsServer, S3Server
from vidgen.local.stack import Service, Stack

__all__ = ["LocalError", "NatsServer", "S3Server", "Service", "Stack"]
