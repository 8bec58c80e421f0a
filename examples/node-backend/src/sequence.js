// One request while it is sampled. Everything from `sent` on is known and not yet streamed.

import { logprobOf, nextDistribution, routingRow, sample, SIGNATURE, top } from "./law.js";
import { float32, int32, uint8 } from "./tensors.js";

export class Sequence {
  /**
   * @param prompt token ids
   * @param sampling SamplingParams; the seed is a BigInt
   * @param emit takes each GenerateResponse, in order
   */
  constructor(prompt, sampling, emit) {
    this.tokens = [...prompt];
    this.promptLength = prompt.length;
    this.sampling = sampling;
    this.emit = emit;
    this.sent = prompt.length;
    this.logprobs = [];
    this.topkIds = [];
    this.topkLogprobs = [];
    this.routing = [];
    this.routed = 0;
    this.spans = [];
  }

  get length() {
    return this.tokens.length;
  }

  get unsent() {
    return this.length - this.sent;
  }

  /** Samples the next token from the weights of `version`, and stamps it with that version. */
  step(key, version) {
    const { temperature, seed, topk, routing } = this.sampling;
    const length = this.length;
    const distribution = nextDistribution(key, length, this.tokens[length - 1], temperature);
    if (routing) this.route(key);
    const tokenId = sample(distribution, length, seed);
    this.tokens.push(tokenId);
    this.logprobs.push(logprobOf(distribution, tokenId));
    if (topk) {
      const candidates = top(distribution, topk);
      this.topkIds.push(...candidates);
      this.topkLogprobs.push(...candidates.map((candidate) => logprobOf(distribution, candidate)));
    }
    const span = this.spans.at(-1);
    if (span?.version === version) span.end_token = length + 1;
    else this.spans.push({ start_token: length, end_token: length + 1, version });
  }

  /** Rows of the tokens that are fed now: the whole prompt at first, then one each. */
  route(key) {
    const first = this.length === this.promptLength ? 0 : this.length - 1;
    for (let position = first; position < this.length; position++) {
      this.routing.push(...routingRow(key, position, this.tokens[position]));
    }
  }

  finishReason() {
    const { max_tokens: maxTokens, stop_token_ids: stops } = this.sampling;
    if (stops.includes(this.tokens.at(-1))) return "FINISH_REASON_STOP";
    if (this.length - this.promptLength >= maxTokens) return "FINISH_REASON_LENGTH";
    return this.length >= SIGNATURE.context_length ? "FINISH_REASON_CONTEXT" : null;
  }

  /** Streams what is known; the labels with it. */
  flush() {
    const range = { start_token: this.sent, end_token: this.length };
    const count = this.unsent;
    const columns = [
      { kind: "COLUMN_KIND_TOKEN_IDS", ...range, values: int32(this.tokens.slice(this.sent)) },
      { kind: "COLUMN_KIND_BEHAVIOR_LOGPROBS", ...range, values: float32(this.logprobs) },
    ];
    if (this.sampling.topk) {
      const shape = [count, this.sampling.topk];
      columns.push(
        { kind: "COLUMN_KIND_TOPK_TOKEN_IDS", ...range, values: int32(this.topkIds, shape) },
        { kind: "COLUMN_KIND_TOPK_LOGPROBS", ...range, values: float32(this.topkLogprobs, shape) },
      );
    }
    if (this.sampling.routing) {
      const { moe_layers: layers, experts_per_token: perToken } = SIGNATURE;
      const rows = this.routing.length / (layers * perToken);
      const end = this.routed + rows;
      const values = uint8(this.routing, [rows, layers, perToken]);
      columns.push({ kind: "COLUMN_KIND_ROUTING", start_token: this.routed, end_token: end, values });
      this.routed = end;
    }
    this.emit({ chunk: { columns, version_spans: this.spans } });
    this.sent = this.length;
    this.logprobs = [];
    this.topkIds = [];
    this.topkLogprobs = [];
    this.routing = [];
    this.spans = [];
  }

  finish(reason) {
    this.flush();
    this.emit({ finished: { finish_reason: reason, token_count: this.length - this.promptLength } });
  }
}
