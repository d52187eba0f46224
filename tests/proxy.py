"""A proxy before PostgreSQL's socket that loses an answer on demand, and counts connections and round trips.

Where it has lost one, the server has done what it was asked, and the client does not learn of it: its connection is
cut instead.
"""

import select
import socket
import threading
from contextlib import suppress
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingUnixStreamServer
from typing import Self

SOCKET = ".s.PGSQL.5432"
READY = b"Z\0\0\0\5I"  # ends each answer: committed, and ready for the next query
SYNC = (b"S\0\0\0\4", b"S\0\0\0\4H\0\0\0\4")  # end each question
GOODBYE = b"X\0\0\0\4"
CHUNK = 65536


class Proxy:
    """Runs while it is entered; `lose` is a piece of the next statement whose answer is to be lost, `lost` a count. One
    that is `hasty` does not wait for the answer: the server is still at work then."""

    def __init__(self, server: Path, folder: Path) -> None:
        self.lose: bytes | None = None
        self.lost = 0
        self.connections = 0
        self.round_trips = 0  # that of a connection's beginning is one
        self.is_hasty = False
        self.hush: bytes | None = None  # a piece of the statements that are taken, and never answered
        self.hushed = 0
        folder.mkdir()
        handler = type("Bound", (_Connection,), {"proxy": self, "address": str(server / SOCKET)})
        self._server = ThreadingUnixStreamServer(str(folder / SOCKET), handler)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def has_lost(self) -> None:
        self.lose = None
        self.lost += 1


class _Connection(BaseRequestHandler):
    proxy: Proxy
    address: str

    def handle(self) -> None:
        asked = answer = b""
        self.proxy.connections += 1
        is_answering = True
        with suppress(ConnectionError), socket.socket(socket.AF_UNIX) as server:  # either side may be gone
            server.connect(self.address)
            while True:
                readable, _, _ = select.select([self.request, server], [], [])
                source = readable[0]
                if not (data := source.recv(CHUNK)):
                    return
                self.proxy.round_trips += is_answering and source is self.request and data != GOODBYE
                is_answering = source is server
                if source is self.request:
                    asked += data
                    if self.proxy.hush and self.proxy.hush in asked:
                        self.proxy.hushed += 1
                        continue
                    server.sendall(data)
                    if self.proxy.is_hasty and self.proxy.lose and self.proxy.lose in asked and asked.endswith(SYNC):
                        self.proxy.has_lost()
                        return
                elif self.proxy.lose is None or self.proxy.lose not in asked:
                    self.request.sendall(data)
                elif (answer := answer + data).endswith(READY):
                    self.proxy.has_lost()
                    return
