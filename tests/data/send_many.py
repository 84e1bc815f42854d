"""Sends messages with attachments by smtplib, on several connections at once.

    send_many.py HOST PORT COUNT CONNECTIONS FOLDER

Each message is kept as FOLDER/TOKEN.eml, byte for byte as it was handed over; its Subject begins with the token. One
in a hundred has no octet at all, and one in five hundred has 4 MB.
"""

import pathlib
import random
import smtplib
import sys
import threading
from email.message import EmailMessage
from email.policy import SMTP


def compose(n):
    chance = random.Random(n)
    token = f"many-{n}"
    if n % 100 == 50:
        return token, b""
    message = EmailMessage(policy=SMTP)
    message["Subject"] = f"{token} Größenübersicht für Łódź №{n}"
    message["From"] = "Bérichte <reports@example.com>"
    message["To"] = f"user{n}@example.org"
    message["Date"] = "Tue, 24 Nov 2026 06:42:11 +0000"
    message["Message-ID"] = f"<{token}@example.com>"
    message.set_content(f"Guten Tag,\n\n.\n..ein Punkt\nNummer {n} – grüße\n", cte=chance.choice(["8bit", "quoted-printable", "base64"]))
    message.add_alternative(f"<html><body><p>Nummer <b>{n}</b></p></body></html>\n", subtype="html")
    # Base64 makes four of three; most are small, as mail is.
    size = 3_000_000 if n % 500 == 260 else int(1_000 * 140 ** chance.random() ** 2)
    message.add_attachment(chance.randbytes(size), maintype="application", subtype="octet-stream", filename=f"Bericht №{n}.bin")
    return token, message.as_bytes()


def send(host, port, numbers, folder, failures):
    try:
        with smtplib.SMTP(host, port, local_hostname="client.test", timeout=60) as smtp:
            for n in numbers:
                token, content = compose(n)
                (folder / f"{token}.eml").write_bytes(content)
                smtp.sendmail(f"bounce+{n}@example.com", [f"user{n}@example.org"], content, ["BODY=8BITMIME"])
    except Exception as error:
        failures.append(error)


def main():
    host, port, count, connections, folder = sys.argv[1:]
    failures = []
    threads = [
        threading.Thread(target=send, args=(host, int(port), range(k, int(count), int(connections)), pathlib.Path(folder), failures))
        for k in range(int(connections))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        sys.exit(f"{failures}")


main()
