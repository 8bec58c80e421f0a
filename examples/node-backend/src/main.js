// node src/main.js --address HOST:PORT: serves leeway.v1.InferenceService until SIGTERM.

import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

import { Engine } from "./engine.js";
import { service } from "./service.js";

const PROTO = fileURLToPath(new URL("../../../proto", import.meta.url));
const MESSAGE_BYTES = 64 << 20;
const STOP_MILLISECONDS = 2000;

const { values: options } = parseArgs({
  options: {
    address: { type: "string", default: "127.0.0.1:7500" },
    proto: { type: "string", default: PROTO },
    "max-concurrency": { type: "string", default: "32" },
    "max-queued": { type: "string", default: "4096" },
    "chunk-tokens": { type: "string", default: "8" },
    "token-milliseconds": { type: "string", default: "0" },
  },
});

const engine = new Engine({
  maxConcurrency: Number(options["max-concurrency"]),
  maxQueued: Number(options["max-queued"]),
  chunkTokens: Number(options["chunk-tokens"]),
  tokenMilliseconds: Number(options["token-milliseconds"]),
});
// uint64 as strings, enums by name, and every field present.
const definition = loadSync("leeway/v1/inference.proto", {
  includeDirs: [options.proto],
  keepCase: true,
  longs: String,
  enums: String,
  defaults: true,
  oneofs: true,
});
const server = new grpc.Server({
  "grpc.max_receive_message_length": MESSAGE_BYTES,
  "grpc.max_send_message_length": MESSAGE_BYTES,
});
server.addService(definition["leeway.v1.InferenceService"], service(engine));
server.bindAsync(options.address, grpc.ServerCredentials.createInsecure(), (error, port) => {
  if (error) {
    console.error(`cannot listen on ${options.address}: ${error.message}`);
    process.exit(2);
  }
  console.error(`serving leeway.v1.InferenceService on port ${port}`);
});

function stop() {
  engine.close();
  setTimeout(() => server.forceShutdown(), STOP_MILLISECONDS).unref();
  server.tryShutdown(() => process.exit(0));
}
process.once("SIGTERM", stop);
process.once("SIGINT", stop);
