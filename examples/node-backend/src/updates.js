// From the messages of UpdateWeights to verified weights. Nothing is put in force here.

import { createHash } from "node:crypto";

import { dataLoss, invalid, precondition } from "./errors.js";
import { TENSOR, weightsKey } from "./law.js";
import { sizeBytes } from "./tensors.js";

const DATA_TYPES = [
  "DATA_TYPE_UNSPECIFIED",
  "DATA_TYPE_UINT8",
  "DATA_TYPE_UINT16",
  "DATA_TYPE_INT32",
  "DATA_TYPE_INT64",
  "DATA_TYPE_FLOAT16",
  "DATA_TYPE_BFLOAT16",
  "DATA_TYPE_FLOAT32",
  "DATA_TYPE_FLOAT64",
];

const sha256 = (data) => createHash("sha256").update(data).digest();

/** The digest of a version, as the comment of TensorEntry in inference.proto says. */
function manifestDigest(tensors) {
  const hash = createHash("sha256");
  for (const { name, dtype, shape, digest } of tensors) {
    hash.update([name, DATA_TYPES.indexOf(dtype), ...shape].map((value) => `${value}\0`).join(""));
    hash.update(digest);
  }
  return hash.digest();
}

/** Collects the messages of one update. */
export class Staging {
  constructor() {
    this.header = null;
    this.pieces = [];
    this.room = 0;
  }

  add(message) {
    if (this.header === null) {
      if (message.message !== "header") throw invalid("an update of weights begins with its header");
      this.header = message.header;
      const tensors = message.header.manifest?.tensors ?? [];
      this.room = tensors.reduce((sum, { dtype, shape }) => sum + sizeBytes(dtype, shape), 0);
      return;
    }
    if (message.message !== "data") throw invalid("after the header of an update come bytes only");
    this.room -= message.data.length;
    if (this.room < 0) throw invalid("more bytes came than the weight manifest lists");
    this.pieces.push(message.data);
  }

  /** The announced version and what the law needs of its weights, all of it verified. */
  verified() {
    if (this.header === null) throw invalid("an update of weights begins with its header");
    const { version, manifest } = this.header;
    if (!version?.run || version.digest.length !== 32) throw invalid("a policy version needs a run and a 32-byte digest");
    if (this.room > 0) throw invalid(`the weights end ${this.room} bytes early`);
    const tensors = manifest?.tensors ?? [];
    if (!manifestDigest(tensors).equals(version.digest)) {
      throw dataLoss("the weight manifest does not have the announced digest; fetch the snapshot again");
    }
    const data = Buffer.concat(this.pieces);
    let start = 0;
    for (const { name, dtype, shape, digest } of tensors) {
      const end = start + sizeBytes(dtype, shape);
      if (!sha256(data.subarray(start, end)).equals(digest)) {
        throw dataLoss(`the bytes of tensor ${name} differ from their digest; fetch the snapshot again`);
      }
      start = end;
    }
    const [tensor] = tensors;
    const fits = tensors.length === 1 && tensor.name === TENSOR.name && tensor.dtype === TENSOR.dtype;
    if (!fits || `${tensor.shape}` !== `${TENSOR.shape}`) {
      throw precondition(`the weights do not fit this model, which has one int64 tensor ${TENSOR.name} [${TENSOR.shape}]`);
    }
    return { version, key: weightsKey(version.digest) };
  }
}
