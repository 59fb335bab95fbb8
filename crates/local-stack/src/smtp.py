"""A mail server that keeps what it takes as lines of JSON, and misbehaves on demand. Started by smtp.rs."""

import argparse
import asyncio
import email
import email.policy
import json
import os
import re
import ssl

from aiosmtpd.smtp import SMTP, AuthResult

# What the local part of a recipient asks for, up to a plus: rcpt-550, data-451-once, take-drop ...
FAULT = re.compile(r"^(?:(rcpt|data)-(\d{3}|hang|drop)|take-(drop|hang))(-once)?(?:\+|@)")


class Handler:
    def __init__(self, folder):
        self.received = os.path.join(folder, "received.jsonl")
        self.done_once = os.path.join(folder, "once")
        os.makedirs(self.done_once, exist_ok=True)

    def fault(self, address, step):
        """What is to go wrong with this recipient at this step, if anything: a code, hang or drop."""
        found = FAULT.match(address)
        if not found:
            return None
        of, what, take, once = found.groups()
        of, what = ("take", take) if take else (of, what)
        if of != step:
            return None
        if once:
            try:
                # Outlives the process, as a mail server's memory of its greylist does.
                open(os.path.join(self.done_once, address.replace("/", "_")), "x").close()
            except FileExistsError:
                return None
        return what

    async def answer(self, server, what):
        if what is None:
            return "250 OK"
        if what == "hang":
            await asyncio.sleep(3600)
        if what == "drop":
            server.transport.abort()
            return "421 gone"
        return f"{what} as asked for"

    async def handle_RCPT(self, server, session, envelope, address, options):
        envelope.rcpt_tos.append(address)
        return await self.answer(server, self.fault(address, "rcpt"))

    async def handle_DATA(self, server, session, envelope):
        address = envelope.rcpt_tos[0]
        fault = self.fault(address, "data")
        if fault is None:
            self.keep(server, session, envelope)
            fault = self.fault(address, "take")
        return await self.answer(server, fault)

    def keep(self, server, session, envelope):
        message = email.message_from_bytes(envelope.original_content, policy=email.policy.default)

        def part(kind):
            found = message.get_body((kind,))
            return found.get_content().replace("\r\n", "\n") if found else ""

        mail = {
            "sender": envelope.mail_from,
            "recipients": envelope.rcpt_tos,
            "headers": [[name.lower(), str(value)] for name, value in message.items()],
            "text": part("plain"),
            "html": part("html"),
            "encrypted": server.transport.get_extra_info("sslcontext") is not None,
            "login": (session.auth_data or b"").decode(),
        }
        with open(self.received, "a", encoding="utf-8") as file:
            file.write(json.dumps(mail) + "\n")


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--certificate", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--implicit", action="store_true")
    parser.add_argument("--user", required=True)
    parser.add_argument("--password", required=True)
    args = parser.parse_args()

    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(args.certificate, args.key)
    handler = Handler(args.folder)

    def authenticate(server, session, envelope, mechanism, data):
        right = (data.login, data.password) == (args.user.encode(), args.password.encode())
        return AuthResult(success=right, handled=False, auth_data=data.login)

    def connection():
        return SMTP(
            handler,
            hostname="localhost",
            enable_SMTPUTF8=True,
            tls_context=None if args.implicit else tls,
            require_starttls=not args.implicit,
            authenticator=authenticate,
            auth_required=True,
            # It does not count TLS from the first byte.
            auth_require_tls=not args.implicit,
        )

    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        connection, "127.0.0.1", args.port, ssl=tls if args.implicit else None
    )
    await server.serve_forever()


asyncio.run(main())
