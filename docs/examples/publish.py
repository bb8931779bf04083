"""Publishes a mail and waits until it is sent: ``RABBITMQ_URL=amqp://… python publish.py invoice.json``.

Needs pika and nothing of mailfleet. Repeating it is safe: the same ``publisher_message_id`` is never sent twice.
"""

import json
import os
import sys
import time
from pathlib import Path

import pika
import pika.exceptions

PATIENCE_SECONDS = float(os.environ.get("PATIENCE_SECONDS", "60"))
SETTLED = ("SendEmailSent", "SendEmailFailed", "SendEmailRejected", "SendEmailExpired", "SendEmailCancelled")


def main(path: str) -> int:
    body = Path(path).read_bytes()
    with pika.BlockingConnection(pika.URLParameters(os.environ["RABBITMQ_URL"])) as connection:
        channel = connection.channel()
        channel.confirm_delivery()  # without it a message may be lost on its way to RabbitMQ
        answers = channel.queue_declare("", exclusive=True).method.queue
        try:
            channel.basic_publish(
                exchange="",
                routing_key="send_email",
                body=body,
                properties=pika.BasicProperties(
                    content_type="application/json",
                    delivery_mode=2,  # kept over a restart of RabbitMQ
                    correlation_id="publish.py",
                    reply_to=answers,
                ),
                mandatory=True,  # returned if there is no such queue
            )
        except pika.exceptions.UnroutableError:
            print("there is no queue send_email: is this mailfleet's RabbitMQ?", file=sys.stderr)
            return 1
        deadline = time.monotonic() + PATIENCE_SECONDS
        for _, properties, answer in channel.consume(answers, auto_ack=True, inactivity_timeout=1):
            if answer is not None:
                print(properties.type, json.loads(answer))
                if properties.type in SETTLED:
                    return 0 if properties.type == "SendEmailSent" else 1
            elif time.monotonic() > deadline:
                break
    print("no word yet; mailfleet status says more", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
