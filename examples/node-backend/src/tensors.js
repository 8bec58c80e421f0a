// Arrays as the contract sends them: element type, shape, little-endian bytes.

import { invalid } from "./errors.js";

const ELEMENT_BYTES = {
  DATA_TYPE_UINT8: 1,
  DATA_TYPE_UINT16: 2,
  DATA_TYPE_INT32: 4,
  DATA_TYPE_INT64: 8,
  DATA_TYPE_FLOAT16: 2,
  DATA_TYPE_BFLOAT16: 2,
  DATA_TYPE_FLOAT32: 4,
  DATA_TYPE_FLOAT64: 8,
};

export function sizeBytes(dtype, shape) {
  if (!(dtype in ELEMENT_BYTES)) throw invalid(`element type ${dtype} is not in leeway.v1.DataType`);
  return shape.reduce((product, extent) => product * extent, ELEMENT_BYTES[dtype]);
}

/** The token ids of an int32 [n]. */
export function readTokenIds(tensor) {
  const { dtype, shape, data } = tensor ?? { dtype: "DATA_TYPE_UNSPECIFIED", shape: [], data: Buffer.alloc(0) };
  const expected = sizeBytes(dtype, shape);
  if (expected !== data.length) {
    throw invalid(`a tensor of shape [${shape}] takes ${expected} bytes, but ${data.length} came`);
  }
  if (dtype !== "DATA_TYPE_INT32" || shape.length !== 1) {
    throw invalid(`a prompt is int32 [n], but this one is ${dtype} [${shape}]`);
  }
  return Array.from({ length: shape[0] }, (_, index) => data.readInt32LE(4 * index));
}

export const int32 = (values, shape = [values.length]) => {
  const data = Buffer.alloc(4 * values.length);
  values.forEach((value, index) => data.writeInt32LE(value, 4 * index));
  return { dtype: "DATA_TYPE_INT32", shape, data };
};

/** Rounds each double to the nearest float32. */
export const float32 = (values, shape = [values.length]) => {
  const data = Buffer.alloc(4 * values.length);
  values.forEach((value, index) => data.writeFloatLE(value, 4 * index));
  return { dtype: "DATA_TYPE_FLOAT32", shape, data };
};

export const uint8 = (values, shape) => ({ dtype: "DATA_TYPE_UINT8", shape, data: Buffer.from(values) });
