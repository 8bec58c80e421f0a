// Errors with a gRPC status. A message says what happened and what to do, in one line.

import { status } from "@grpc/grpc-js";

export class RpcError extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
    this.details = message;
  }
}

export const invalid = (message) => new RpcError(status.INVALID_ARGUMENT, message);
export const precondition = (message) => new RpcError(status.FAILED_PRECONDITION, message);
export const dataLoss = (message) => new RpcError(status.DATA_LOSS, message);
export const exhausted = (message) => new RpcError(status.RESOURCE_EXHAUSTED, message);
export const unavailable = (message) => new RpcError(status.UNAVAILABLE, message);
