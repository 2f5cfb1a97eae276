"""The formation channel: protocol messages over mutually authenticated TLS 1.3.

One TCP port serves both channels. The client first sends eight plain bytes that choose the
channel; then both sides do a TLS handshake with certificates required of each. The server ends
it with an empty frame: in TLS 1.3 a client is done before the server has judged the client's
certificate (RFC 8446, section 4.4.4), so only that frame tells the client that it is welcome.
Then either side sends frames: a length (4 bytes, big-endian) and one encoded message.

TLS runs in memory buffers on a plain stream, not in asyncio's own TLS, because that one drops
the alert of a failed handshake: a host with another token would look like a broken network.

Everything that happens goes into one inbox as events. Nothing is logged, and whatever a stranger
can cause is bounded in size, time and number (see `Limits`).

strangers    what an address may do before it is a peer, and how much is told about it
tunnel       TLS over a plain stream, and the frames in it
connections  listening, dialling, and the connections that stand
"""

from firstboot.transport.connections import SELECTORS, Transport
from firstboot.transport.strangers import Limits
from firstboot.transport.tunnel import Credentials

__all__ = ["SELECTORS", "Credentials", "Limits", "Transport"]
