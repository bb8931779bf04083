// Publishes a mail and waits until it is sent: RABBITMQ_URL=amqp://… node publish.mjs invoice.json
//
// Needs amqplib (npm install amqplib) and nothing of mailfleet. Repeating it is safe: the same publisher_message_id is
// never sent twice.

import { readFile } from "node:fs/promises";
import amqp from "amqplib";

const PATIENCE_MS = 1000 * (process.env.PATIENCE_SECONDS ?? 60);
const SETTLED = ["SendEmailSent", "SendEmailFailed", "SendEmailRejected", "SendEmailExpired", "SendEmailCancelled"];

const body = await readFile(process.argv[2]);
const connection = await amqp.connect(process.env.RABBITMQ_URL);
// Without confirms a message may be lost on its way to RabbitMQ.
const channel = await connection.createConfirmChannel();
const { queue } = await channel.assertQueue("", { exclusive: true });

const outcome = new Promise((resolve) => {
  channel.on("return", () => resolve("there is no queue send_email: is this mailfleet's RabbitMQ?"));
  channel.consume(
    queue,
    (message) => {
      console.log(message.properties.type, JSON.parse(message.content.toString()));
      if (SETTLED.includes(message.properties.type)) resolve(message.properties.type);
    },
    { noAck: true },
  );
  setTimeout(resolve, PATIENCE_MS, "no word yet; mailfleet status says more");
});

channel.publish("", "send_email", body, {
  contentType: "application/json",
  persistent: true, // kept over a restart of RabbitMQ
  correlationId: "publish.mjs",
  replyTo: queue,
  mandatory: true, // returned if there is no such queue
});
await channel.waitForConfirms();

const became = await outcome;
if (!SETTLED.includes(became)) console.error(became);
await connection.close();
process.exit(became === "SendEmailSent" ? 0 : 1);
