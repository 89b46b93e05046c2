"""Who may talk to the server: hosts, origins, a token, sessions.

A page of another site can neither read an answer nor cause one: the host must be ours (a name that an attacker points at this
machine is not), a request that changes something must come from our own page, and every route but the shell needs a session, for
which the token is exchanged once. The token is in the fragment of the printed address, which browsers send to nobody.
"""

import hmac
import secrets
import time
from collections import deque
from dataclasses import dataclass, field
from http.cookies import SimpleCookie

SESSION_SECONDS = 12 * 3600
"""After which a session that was not used ends."""
MOST_WRONG, WRONG_SECONDS = 5, 60.0
"""Wrong tokens that an address may send in that time."""
MOST_BODY = 1 << 20
"""Bytes of a request's body."""


@dataclass
class Session:
    """A browser that knew the token. csrf: what it must send with every change. used: when it was used last."""

    csrf: str
    used: float


@dataclass
class Guard:
    """The rules of one server.

    Attributes:
        token: that opens a session. hosts: values of the Host header that are ours. cookie: name of the session's cookie.
    """

    token: str
    hosts: frozenset[str]
    cookie: str
    sessions: dict[str, Session] = field(default_factory=dict)
    wrong: dict[str, deque[float]] = field(default_factory=dict)

    def refuses_host(self, host: str) -> bool:
        """Whether the Host header is not ours."""
        return host.lower() not in self.hosts

    def refuses_origin(self, origin: str | None, site: str | None) -> bool:
        """Whether a request that changes something comes from another page."""
        if origin is not None:
            return origin.lower() not in {f"http://{host}" for host in self.hosts}
        return site not in (None, "same-origin")

    def is_blocked(self, address: str) -> bool:
        """Whether an address has sent too many wrong tokens."""
        tries = self.wrong.get(address, deque())
        while tries and time.monotonic() - tries[0] > WRONG_SECONDS:
            tries.popleft()
        return len(tries) >= MOST_WRONG

    def open(self, token: str, address: str) -> tuple[str, Session] | None:
        """A new session for whoever knows the token; None for the others."""
        if not hmac.compare_digest(token.encode("utf-8", "surrogatepass"), self.token.encode()):
            self.wrong.setdefault(address, deque()).append(time.monotonic())
            return None
        key, session = secrets.token_urlsafe(32), Session(secrets.token_urlsafe(32), time.monotonic())
        self.sessions[key] = session
        return key, session

    def session(self, cookies: str | None) -> Session | None:
        """The session of a Cookie header; None if there is none, or it has ended."""
        jar: SimpleCookie = SimpleCookie()
        try:
            jar.load(cookies or "")
        except Exception:  # of a header that is none
            return None
        morsel = jar.get(self.cookie)
        found = self.sessions.get(morsel.value) if morsel else None
        if found is None or time.monotonic() - found.used > SESSION_SECONDS:
            return None
        found.used = time.monotonic()
        return found

    def close(self, session: Session) -> None:
        """End a session."""
        self.sessions = {key: other for key, other in self.sessions.items() if other is not session}


def headers(nonce: str) -> dict[str, str]:
    """Of every answer.

    Args:
        nonce: that style elements of the page carry.
    """
    policy = (
        f"default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'nonce-{nonce}'; script-src 'self'; connect-src 'self'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'self'; object-src 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
