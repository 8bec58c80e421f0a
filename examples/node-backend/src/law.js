// The arithmetic law of leeway/arithmetic.py: the same tokens and the same log-probs from the same published weights.

import { createHash } from "node:crypto";

const ALPHABET = " 0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
const MASK = (1n << 64n) - 1n;
const TWO_TO_MINUS_53 = 2 ** -53;

const sha256 = (...parts) => parts.reduce((hash, part) => hash.update(part), createHash("sha256")).digest();

export const TENSOR = { name: "arithmetic.weight", dtype: "DATA_TYPE_INT64", shape: [256] };
export const SIGNATURE = {
  model_digest: sha256("leeway arithmetic model 1"),
  tokenizer_digest: sha256("leeway arithmetic tokenizer 1\0", ALPHABET),
  vocab_size: 1 + ALPHABET.length,
  moe_layers: 2,
  experts: 8,
  experts_per_token: 2,
  context_length: 4096,
};

/** The finalizer of SplitMix64. */
function mix(value) {
  value = ((value ^ (value >> 30n)) * 0xbf58476d1ce4e5b9n) & MASK;
  value = ((value ^ (value >> 27n)) * 0x94d049bb133111ebn) & MASK;
  return value ^ (value >> 31n);
}

/** 64 bits that depend on three numbers. */
function hash(a, b, c) {
  const state = (a * 0x9e3779b97f4a7c15n + b * 0xc2b2ae3d27d4eb4fn + c * 0x165667b19e3779f9n) & MASK;
  return mix(mix((state + 0x2545f4914f6cdd1dn) & MASK));
}

/** What the law knows of a version: the first 8 bytes of the digest of its weights, little-endian. */
export const weightsKey = (digest) => digest.readBigUInt64LE(0);

/** The distribution of the token after `length` tokens, the last of which is `lastToken`. */
export function nextDistribution(key, length, lastToken, temperature) {
  const bits = hash(key, BigInt(length), BigInt(lastToken));
  const others = SIGNATURE.vocab_size - 1;
  let favoured = 0.05 + 0.9 * Number(bits >> 11n) * TWO_TO_MINUS_53;
  let other = (1 - favoured) / others;
  if (temperature !== 1) {
    favoured = favoured ** (1 / temperature);
    other = other ** (1 / temperature);
    const total = favoured + others * other;
    favoured /= total;
    other /= total;
  }
  return {
    favoured: Number(bits % BigInt(SIGNATURE.vocab_size)),
    favouredLogprob: Math.log(favoured),
    otherLogprob: Math.log(other),
  };
}

export const logprobOf = (distribution, tokenId) =>
  tokenId === distribution.favoured ? distribution.favouredLogprob : distribution.otherLogprob;

/** Draws a token; depends on seed (a BigInt) and position only. */
export function sample(distribution, length, seed) {
  const bits = hash(seed, BigInt(length), 0x5a3n);
  if (Number(bits >> 11n) * TWO_TO_MINUS_53 < Math.exp(distribution.favouredLogprob)) return distribution.favoured;
  const offset = Number(mix(bits) % BigInt(SIGNATURE.vocab_size - 1));
  return (distribution.favoured + 1 + offset) % SIGNATURE.vocab_size;
}

/** The `count` likeliest token ids, likeliest first; ties in order of id. */
export function top(distribution, count) {
  const others = [...Array(count).keys()].filter((tokenId) => tokenId !== distribution.favoured);
  return [distribution.favoured, ...others, count].slice(0, count);
}

/** Experts of a token, layer by layer. */
export function routingRow(key, position, tokenId) {
  const { experts, experts_per_token: perToken, moe_layers: layers } = SIGNATURE;
  const row = [];
  for (let layer = 0; layer < layers; layer++) {
    const bits = hash(key, (BigInt(position) << 8n) | BigInt(layer), BigInt(tokenId));
    const start = Number(bits % BigInt(experts));
    const stride = 1 + 2 * Number((bits >> 16n) % BigInt(experts / 2));
    for (let slot = 0; slot < perToken; slot++) row.push((start + slot * stride) % experts);
  }
  return row;
}
